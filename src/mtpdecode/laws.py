"""Exact laws of texts, by enumeration: of an acceptance rule, of a small model; and whether counts agree with a law."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from .acceptance import Acceptance, accept_matches
from .errors import GenerationError
from .state import Draft
from .target import evaluating, training_modules

Tokens = tuple[int, ...]
Law = Callable[[Tokens], Tensor]
"""What comes next: the tokens so far -> (V,) float64."""
TextLaw = dict[Tokens, float]
"""The probability of each text that can come."""

MAX_TEXTS = 4096
"""The most texts that `continuation_law` runs through a model at a time."""


def exact_law(rule: Acceptance | None, target_law: Law, draft_law: Law, num_draft: int, *, sampled: bool = True) -> TextLaw:
    """The law of the first K + 1 tokens, K = num_draft, when a rule judges K draft tokens and the target goes on by itself.

    rule        None: compares the draft with the target's own draws ("coupled"), here independent of the draft's
    draft_law   what each draft token is drawn from; sampled=False: its likeliest token is taken, and q is one-hot

    Nothing is drawn: all drafts and all outcomes of the rule's independent tests are gone through, in float64.
    """
    return exact_laws(rule, [(target_law, draft_law)], num_draft, sampled=sampled)[0]


def exact_laws(
    rule: Acceptance | None, problems: Sequence[tuple[Law, Law]], num_draft: int, *, sampled: bool = True
) -> list[TextLaw]:
    """`exact_law` of several (target_law, draft_law), all of one vocabulary.

    They are rows of the same tensors, so a rule that mixes up its rows is caught.
    """
    verdicts = verdict_laws(rule, problems, num_draft, sampled=sampled)
    return [_continued(verdict, target, num_draft + 1) for verdict, (target, _) in zip(verdicts, problems, strict=True)]


def verdict_laws(
    rule: Acceptance | None, problems: Sequence[tuple[Law, Law]], num_draft: int, *, sampled: bool = True
) -> list[TextLaw]:
    """Like `exact_laws`, of the 1 to K + 1 tokens that one round appends."""
    rows = [row for which, laws in enumerate(problems) for row in _drafts(which, *laws, num_draft, sampled)]
    probs = torch.stack([row.probs for row in rows]) if sampled and num_draft else None
    draft = Draft(torch.tensor([row.tokens for row in rows], dtype=torch.long).view(len(rows), num_draft), probs)
    target_probs = torch.stack([row.target_probs for row in rows])
    outcomes = _matched(draft, target_probs) if rule is None else _judged(rule, draft, target_probs)
    laws: list[TextLaw] = [defaultdict(float) for _ in problems]
    for place, text, mass in outcomes:
        laws[rows[place].problem][text] += rows[place].mass * mass
    return [dict(law) for law in laws]


def text_law(law: Law, num_tokens: int) -> TextLaw:
    """The law of the first num_tokens tokens."""
    return _continued({(): 1.0}, law, num_tokens)


class _Drafted(NamedTuple):
    """One possible draft of one problem. probs (K, V), target_probs (K+1, V)."""

    problem: int
    tokens: Tokens
    mass: float
    probs: Tensor
    target_probs: Tensor


def _drafts(problem: int, target_law: Law, draft_law: Law, num_draft: int, sampled: bool) -> Iterator[_Drafted]:
    """Every draft that can come."""
    for tokens, mass in text_law(draft_law if sampled else _likeliest(draft_law), num_draft).items():
        prefixes = [tokens[:size] for size in range(num_draft + 1)]
        probs = torch.stack([draft_law(prefix) for prefix in prefixes])[:-1]
        yield _Drafted(problem, tokens, mass, probs, torch.stack([target_law(prefix) for prefix in prefixes]))


def _likeliest(law: Law) -> Law:
    """The law of taking the likeliest token."""
    return lambda text: torch.zeros_like(law(text)).scatter(0, law(text).argmax(-1, keepdim=True), 1.0)


def _judged(rule: Acceptance, draft: Draft, target_probs: Tensor) -> Iterator[tuple[int, Tokens, float]]:
    """(row, appended text, probability) of every outcome of the tests and every replacement; all are rows of one call."""
    num_rows, num_draft = draft.tokens.shape
    chances = rule.keep(draft, target_probs) if num_draft else torch.ones(num_rows, 0, dtype=torch.float64)
    outcomes = torch.tensor(list(product([False, True], repeat=num_draft)), dtype=torch.bool).view(2**num_draft, num_draft)
    origin = torch.arange(num_rows).repeat_interleave(len(outcomes))
    passed = outcomes.repeat(num_rows, 1)
    num_kept = rule.num_kept(passed) if num_draft else torch.zeros_like(origin)
    draft = Draft(draft.tokens[origin], None if draft.probs is None else draft.probs[origin])
    weights = rule.residual(draft, target_probs[origin], num_kept)
    masses = torch.where(passed, chances[origin], 1 - chances[origin]).prod(-1)[:, None] * weights / weights.sum(-1, keepdim=True)
    for place, token in (masses != 0).nonzero().tolist():  # also nan, and what a wrong rule takes for less than nothing
        yield int(origin[place]), (*draft.tokens[place, : num_kept[place]].tolist(), token), float(masses[place, token])


def _matched(draft: Draft, target_probs: Tensor) -> Iterator[tuple[int, Tokens, float]]:
    """The same for "coupled": every K + 1 tokens that the target may draw, each from its position's law."""
    (num_rows, num_draft), vocab_size = draft.tokens.shape, target_probs.shape[-1]
    for drawn in product(range(vocab_size), repeat=num_draft + 1):
        tokens = torch.tensor(drawn).expand(num_rows, -1)
        masses = target_probs.gather(-1, tokens[..., None])[..., 0].prod(-1).tolist()
        verdict = accept_matches(draft, tokens)
        for row, (text, count) in enumerate(zip(verdict.tokens.tolist(), verdict.counts.tolist(), strict=True)):
            if masses[row]:
                yield row, tuple(text[:count]), masses[row]


def _continued(law: TextLaw, next_law: Law, num_tokens: int) -> TextLaw:
    """Texts of up to num_tokens tokens, continued with a law until they have as many."""
    full: TextLaw = defaultdict(float)
    for text, mass in law.items():
        if len(text) < num_tokens:
            longer = {(*text, token): mass * chance for token, chance in enumerate(next_law(text).tolist()) if chance}
            for longest, chance in _continued(longer, next_law, num_tokens).items():
                full[longest] += chance
        else:
            full[text] += mass
    return dict(full)


def continuation_law(target: PreTrainedModel, prompt: Sequence[int], num_tokens: int, **options: Any) -> TextLaw:
    """The law of the num_tokens tokens that follow a prompt under plain sampling, by running the model on every text.

    options  what `model.generate` takes: temperature, top_k, logits_processor, eos_token_id ... transformers prepares them, and
             they are applied to one text at a time, so nothing of mtpdecode's is in the way

    Texts end behind an end token. Raises GenerationError where more than 4096 texts precede the last token.
    """
    processors, end_ids = _prepared(target, prompt, {"max_new_tokens": num_tokens} | options)
    law: TextLaw = {(): 1.0}
    ended: TextLaw = {}
    for _ in range(num_tokens):
        longer: TextLaw = {}
        for text, chances in zip(law, _next_laws(target, prompt, list(law), processors), strict=True):
            longer |= {(*text, token): law[text] * chance for token, chance in enumerate(chances) if chance}
        ended |= {text: mass for text, mass in longer.items() if text[-1] in end_ids}
        law = {text: mass for text, mass in longer.items() if text[-1] not in end_ids}
    return law | ended


def _prepared(
    target: PreTrainedModel, prompt: Sequence[int], options: Mapping[str, Any]
) -> tuple[list[LogitsProcessor], frozenset[int]]:
    """The processors and the end tokens with which transformers would sample."""

    def hand_over(model: PreTrainedModel, input_ids: Tensor, **given: Any) -> tuple[list[LogitsProcessor], GenerationConfig]:
        return given["logits_processor"], given["generation_config"]

    inputs = torch.tensor([list(prompt)], device=target.device)
    sampling = {"attention_mask": torch.ones_like(inputs), "do_sample": True, "custom_generate": hand_over}
    generate = cast("Callable[..., Any]", target.generate)
    processors, config = generate(inputs, **(sampling | dict(options)))
    ids = config.eos_token_id
    return processors, frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)


def _next_laws(
    target: PreTrainedModel, prompt: Sequence[int], texts: list[Tokens], processors: list[LogitsProcessor]
) -> list[list[float]]:
    if len(texts) > MAX_TEXTS:
        raise GenerationError(
            f"The law of a continuation was asked for; {len(texts)} texts precede its last token, and {MAX_TEXTS} are the most "
            "that are gone through. Ask for fewer tokens, or take a smaller vocabulary or a smaller top_k."
        )
    if not texts:
        return []
    ids = torch.tensor([[*prompt, *text] for text in texts], device=target.device)
    with torch.no_grad(), evaluating(training_modules(target)):
        logits = target(ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        scores = torch.cat([_processed(processors, ids[row : row + 1], logits[row : row + 1]) for row in range(len(texts))])
    laws: list[list[float]] = scores.double().softmax(-1).tolist()
    return laws


def _processed(processors: list[LogitsProcessor], ids: Tensor, scores: Tensor) -> Tensor:
    """ids (1, n), scores (1, V)"""
    for processor in processors:
        scores = processor(ids, scores)
    return scores


def g_test(observed: Mapping[Tokens, int], law: Mapping[Tokens, float]) -> float:
    """The p-value of counts under a law: how often counts so far from it, or farther, come if it is the true one.

    The likelihood-ratio test (G) with Williams' correction; texts that are expected fewer than 5 times count as one. It is 0.0
    where a text came that cannot come.
    """
    num = sum(observed.values())
    if any(count and not law.get(text) for text, count in observed.items()):
        return 0.0
    cells = _merged([(float(observed.get(text, 0)), num * mass) for text, mass in law.items()])
    if len(cells) < 2:
        return 1.0
    seen, expected = torch.tensor(cells, dtype=torch.float64).T
    statistic = 2 * torch.special.xlogy(seen, seen / expected).sum()
    williams = 1 + ((num / expected).sum() - 1) / (6 * num * (len(cells) - 1))
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic.clamp(min=0) / williams / 2))


def _merged(cells: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(seen, expected) pairs, the rare ones added up until every expectation is at least 5."""
    rare, cells = (0.0, 0.0), sorted(cells, key=lambda cell: cell[1])
    while cells and (cells[0][1] < 5 or 0 < rare[1] < 5):
        seen, expected = cells.pop(0)
        rare = (rare[0] + seen, rare[1] + expected)
    return [rare, *cells] if rare[1] else cells
