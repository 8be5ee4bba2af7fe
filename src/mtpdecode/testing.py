"""Proofs that the output's law is the target's: for rules, proposers and decoders of one's own as for ours.

    assert_lossless(MyAcceptance())      the probability of every text, by enumeration: off by less than 1e-12
    assert_lossless(MyProposer())        20,000 texts a setting through the real loop, against a law known exactly
    assert_lossless(decoder, top_k=5)    the same for a decoder, if its target is small enough to enumerate

Nothing here is needed for decoding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .acceptance import ACCEPTANCE, Acceptance
from .decoder import MTPDecoder
from .errors import GenerationError
from .laws import Law as Law
from .laws import TextLaw as TextLaw
from .laws import Tokens as Tokens
from .laws import continuation_law as continuation_law
from .laws import exact_law as exact_law
from .laws import exact_laws as exact_laws
from .laws import g_test as g_test
from .laws import text_law as text_law
from .laws import verdict_laws as verdict_laws
from .proposer import Proposer
from .state import Draft
from .tables import TableLM as TableLM
from .tables import TableProposer as TableProposer
from .tables import random_table as random_table
from .tables import table_law as table_law

FALSE_ALARM = 1e-4
"""How often, at most, `assert_lossless` refuses a lossless proposer or decoder, all settings of one call together."""
TOLERANCE = 1e-12
"""How far the exact law of a lossless rule may be off, in float64."""
HOW = ("num_speculative_tokens", "draft_sampling", "acceptance")
"""Options that say how to speculate; a plain law knows none of them."""


def assert_lossless(
    subject: Acceptance | Proposer | MTPDecoder,
    *,
    target: PreTrainedModel | None = None,
    prompt: Sequence[int] = (0, 1, 0, 1),
    num_tokens: int = 3,
    num_samples: int = 20_000,
    seed: int = 0,
    batch_size: int = 4096,
    **options: Any,
) -> None:
    """Raise AssertionError, with a text and the setting that show it, unless the output's law is the target's.

    subject   an acceptance rule is proved: its exact law (`exact_laws`) is that of the target on random tables of 2 to 4 tokens,
              with 0 to 3 draft tokens, drawn and chosen, with zeros and with p equal to q. Takes no other argument but `seed`
              a proposer is tested with K of 1, 2 and 3 under every lossless rule, on `target`, else on a random `TableLM`
              a decoder is tested as it stands; its target must be small, for the law is found by running it on all texts
    options   what `generate` takes: temperature, top_p, num_speculative_tokens, acceptance ...

    The law of the num_tokens tokens behind `prompt` (`continuation_law`) is compared with num_samples texts (`sample_texts`).
    Seeds are fixed, so the answer is the same every time. Each of n settings fails at p < 1e-4 / n, so that a lossless subject
    is refused with a probability of at most 1e-4; a law that is off by d in total variation is caught, nearly surely, by
    num_samples of ten times (number of texts) / d**2.
    """
    if isinstance(subject, Acceptance):
        if options:
            raise GenerationError(
                f"assert_lossless(rule) was given {', '.join(options)}; a rule is proved without a decoder. Leave them out, or "
                "test MTPDecoder.from_model(..., acceptance=rule)."
            )
        return _assert_rule(subject, seed)
    settings = [options] if isinstance(subject, MTPDecoder) else [options | setting for setting in _settings(options)]
    if isinstance(subject, Proposer):
        subject = MTPDecoder.from_model(TableLM(random_table(5, seed)) if target is None else target, proposer=subject)
    for setting in settings:
        plain = {name: value for name, value in setting.items() if name not in HOW}
        budget = {"max_new_tokens": num_tokens + deepest(subject, setting)}
        law = continuation_law(subject.target, prompt, num_tokens, **(budget | plain))
        seen = sample_texts(subject, prompt, num_tokens, num_samples, seed=seed, batch_size=batch_size, **setting)
        assert_counts(seen, law, num_tests=len(settings), setting=setting)


def _settings(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What to try with a proposer where the caller does not say it."""
    lengths = [options["num_speculative_tokens"]] if "num_speculative_tokens" in options else [1, 2, 3]
    rules = [options["acceptance"]] if "acceptance" in options else list(ACCEPTANCE)
    return [{"num_speculative_tokens": length, "acceptance": rule} for length, rule in product(lengths, rules)]


def assert_counts(observed: Mapping[Tokens, int], law: TextLaw, *, num_tests: int = 1, setting: object = "") -> None:
    """Raise AssertionError, with the p-value and the worst text, where `g_test` gives p < 1e-4 / num_tests."""
    p_value, num, threshold = g_test(observed, law), sum(observed.values()), FALSE_ALARM / num_tests
    if p_value >= threshold:
        return

    def surprise(text: Tokens) -> float:
        expected = num * law.get(text, 0.0)
        return (observed.get(text, 0) - expected) ** 2 / (expected + 1e-9)

    worst = max({*law, *observed}, key=surprise)
    raise AssertionError(
        f"{setting}: not the target's law, p = {p_value:.2g} (fails below {threshold:.2g}). Of {num} texts, {list(worst)} came "
        f"{observed.get(worst, 0)} times; {num * law.get(worst, 0.0):.1f} were expected."
    )


def sample_texts(
    decoder: MTPDecoder,
    prompt: Sequence[int],
    num_tokens: int,
    num_samples: int = 20_000,
    *,
    seed: int = 0,
    batch_size: int = 4096,
    **options: Any,
) -> Counter[Tokens]:
    """How often each text of num_tokens tokens follows a prompt when a decoder samples num_samples times, as rows of batches.

    The decoder is asked for K tokens more than are counted, so that rounds which begin within the text draft K tokens.
    """
    settings = {"do_sample": True, "max_new_tokens": num_tokens + deepest(decoder, options)} | options
    counts: Counter[Tokens] = Counter()
    for batch, start in enumerate(range(0, num_samples, batch_size)):
        ids = torch.tensor([list(prompt)] * min(batch_size, num_samples - start), device=decoder.target.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        counts.update(first_tokens(decoder, inputs, num_tokens, seed=seed + batch, **settings))
    return counts


def first_tokens(decoder: MTPDecoder, inputs: Mapping[str, Tensor], num_tokens: int, **options: Any) -> list[Tokens]:
    """The first num_tokens new tokens of every row; decoding stops where all rows have them or have ended."""
    texts: list[list[int]] = [[] for _ in range(len(inputs["attention_mask"]))]
    for chunk in decoder.stream(**inputs, **options):
        for text, tokens in zip(texts, chunk.tokens, strict=True):
            text += tokens
        if all(len(text) >= num_tokens or not tokens for text, tokens in zip(texts, chunk.tokens, strict=True)):
            break  # a row that appended nothing has ended
    return [tuple(text[:num_tokens]) for text in texts]


def deepest(decoder: MTPDecoder, options: Mapping[str, Any]) -> int:
    """The largest K that a call drafts."""
    return max(decoder.options.replaced({name: options[name] for name in HOW if name in options}).schedule.choices)


def _assert_rule(rule: Acceptance, seed: int) -> None:
    for vocab_size, num_draft, sampled in product((2, 3, 4), range(4), (True, False)):
        problems = rule_problems(vocab_size, seed)
        for law, (target, _) in zip(exact_laws(rule, problems, num_draft, sampled=sampled), problems, strict=True):
            expected = text_law(target, num_draft + 1)
            worst, error = largest_error(law, expected)
            if not error < TOLERANCE:
                raise AssertionError(
                    f"{type(rule).__name__} is not lossless: with {vocab_size} tokens and K = {num_draft}, drafts "
                    f"{'drawn' if sampled else 'chosen'}, the text {list(worst)} has probability {law.get(worst, 0.0):.6f}; the "
                    f"target gives it {expected.get(worst, 0.0):.6f}."
                )


def largest_error(law: TextLaw, expected: TextLaw) -> tuple[Tokens, float]:
    """The text whose probabilities differ most, and by how much; nan is the largest error of all."""
    errors = {text: abs(law.get(text, 0.0) - expected.get(text, 0.0)) for text in {**expected, **law}}
    worst = max(errors, key=lambda text: (errors[text] != errors[text], errors[text]))
    return worst, errors[worst]


def rule_problems(vocab_size: int, seed: int = 0) -> list[tuple[Law, Law]]:
    """(target_law, draft_law) of every kind: both random, zeros in one or in both, p equal to q."""

    def law(number: int, num_zeros: int = 0) -> Law:
        return table_law(random_table(vocab_size, 10 * seed + number, num_zeros))

    rest, half = vocab_size - 1, vocab_size // 2
    return [
        (law(0), law(1)),
        (law(2, rest), law(3)),
        (law(4), law(5, rest)),
        (law(6, half), law(7, half)),
        (law(8), law(8)),
        (law(9, half), law(9, half)),
    ]


class SyntheticAcceptance(Acceptance):
    """NOT LOSSLESS: the text is not the target's. For measuring speed only, where no trained head is at hand.

    Draft token k is kept with the chance rates[k - 1] once those before it are, whatever the two laws say; behind the kept tokens
    comes a draw from the target's law. So a round costs what it costs, and gives as many tokens as with a head of these rates.
    No name leads here, neither acceptance="synthetic" nor another: only this class, as acceptance=SyntheticAcceptance(...).

    rates   a chance for each draft position, 0 to 1; positions behind the last have the last
    """

    def __init__(self, rates: Sequence[float]) -> None:
        if not rates or not all(0.0 <= rate <= 1.0 for rate in rates):
            raise GenerationError(
                f"SyntheticAcceptance({rates!r}) was asked for; it wants a chance of 0 to 1 for each draft position: "
                "[0.8, 0.6], say."
            )
        self.rates = tuple(map(float, rates))

    def keep(self, draft: Draft, target_probs: Tensor) -> Tensor:
        num_rows, num_draft = draft.tokens.shape
        rates = [self.rates[min(k, len(self.rates) - 1)] for k in range(num_draft)]
        return torch.cat([target_probs.new_full((num_rows, 1), rate) for rate in rates], dim=1)  # no list goes to the device

    def num_kept(self, passed: Tensor) -> Tensor:
        return passed.long().cumprod(-1).sum(-1)

    def residual(self, draft: Draft, target_probs: Tensor, num_kept: Tensor) -> Tensor:
        return target_probs.gather(1, num_kept[:, None, None].expand(-1, 1, target_probs.shape[-1]))[:, 0]
