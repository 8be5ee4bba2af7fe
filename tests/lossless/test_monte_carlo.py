"""Samples through the real loop against the target's exact law, over processors, K, rules, proposers and ragged batches.

Every cell draws 1,200 or 4,000 texts of 3 tokens with fixed seeds. All cells together refuse a lossless decoder with a chance of
2e-4 at most; what they catch is measured in test_planted_faults.py.
"""

from collections import Counter
from functools import cache
from itertools import combinations, product
from random import Random

import pytest
import torch

from mtpdecode import BlockAcceptance, Draft, MTPDecoder, NGramProposer, StandardAcceptance
from mtpdecode.acceptance import accept
from mtpdecode.request import seeds_for
from mtpdecode.sampling import race
from mtpdecode.state import Noise, Purpose
from mtpdecode.testing import (
    TableProposer,
    assert_counts,
    continuation_law,
    first_tokens,
    random_table,
    rule_problems,
    verdict_laws,
)
from tests.tiny import padded
from tests.toys import Contrary, random_head, table_target, tiny_llama

NUM_TOKENS, SEED = 3, 1
PROMPTS = ([0, 1, 0, 1, 2], [3, 1])
TARGETS = {"table": table_target(5, seed=4), "llama": tiny_llama(5, seed=3)}

PROCESSORS = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.7},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[1], [2, 3]]},
    "min_new_tokens": {"min_new_tokens": 2, "eos_token_id": [0, 2], "pad_token_id": 4},
    "a user's own": {"logits_processor": [Contrary()]},
    "several": {"temperature": 1.4, "top_k": 4, "repetition_penalty": 0.6, "eos_token_id": [1], "pad_token_id": 1},
}
ONE_BY_ONE = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_new_tokens", "a user's own", "several")
"""Processors that see each row and position alone: slower, so these cells have fewer samples."""
PROPOSERS = {
    "head": lambda target: {"head": random_head(target)},
    "two-layer head": lambda target: {"head": random_head(target, num_layers=2)},
    "head over three tokens": lambda target: {"head": random_head(target, draft_vocabulary=[0, 2, 3])},
    "n-gram": lambda target: {"proposer": NGramProposer()},
    "table": lambda target: {"proposer": TableProposer(random_table(5, seed=8))},
    "table, chosen": lambda target: {"proposer": TableProposer(random_table(5, seed=8), sampled=False)},
}
FACTORS = {
    "processor": list(PROCESSORS),
    "num_speculative_tokens": [1, 2, 3],
    "acceptance": ["standard", "block", "coupled"],
    "proposer": list(PROPOSERS),
    "draft_sampling": ["sample", "greedy"],
    "target": list(TARGETS),
    "batch": ["even", "ragged"],
}


@cache
def covering():
    """36 cells, one for each processor and K: greedily, the one that makes the most pairs of values meet for the first time."""
    first, second, *others = FACTORS.values()
    met, cells, chance = set(), [], Random(SEED)
    for processor, num_draft in product(first, second):
        candidates = [(processor, num_draft, *rest) for rest in product(*others)]
        chance.shuffle(candidates)
        cells.append(max(candidates, key=lambda cell: len(pairs(cell) - met)))
        met |= pairs(cells[-1])
    return cells


def pairs(cell):
    return set(combinations(enumerate(cell), 2))


def test_the_cells_cover_all_pairs():
    """Every value of a factor meets every value of each other one; of the 6 proposers each processor meets 3."""
    met = set().union(*map(pairs, covering()))
    for (first, one), (second, other) in combinations(enumerate(FACTORS.values()), 2):
        together = sum(((first, x), (second, y)) in met for x, y in product(one, other))
        assert together == len(one) * (3 if (first, second) == (0, 3) else len(other)), (first, second)


def samples(decoder, prompts, num_samples, side="left", **options):
    """One Counter of texts per prompt: the prompts take turns in the rows of one batch."""
    times = num_samples // len(prompts)
    inputs = {name: tensor.repeat(times, 1) for name, tensor in padded(list(prompts), side).items()}
    texts = first_tokens(decoder, inputs, NUM_TOKENS, do_sample=True, seed=2, **options)
    return [Counter(texts[which :: len(prompts)]) for which in range(len(prompts))]


@pytest.mark.parametrize("cell", covering(), ids=lambda cell: "-".join(map(str, cell)))
def test_the_law_is_the_targets(cell):
    """The first three tokens have the law that running the target on all texts gives."""
    processor, num_draft, acceptance, proposer, draft_sampling, target, batch = cell
    model, options = TARGETS[target], PROCESSORS[processor]
    decoder = MTPDecoder.from_model(
        model,
        **PROPOSERS[proposer](model),
        num_speculative_tokens=num_draft,
        acceptance=acceptance,
        draft_sampling=draft_sampling,
    )
    num_samples = 1200 if processor in ONE_BY_ONE else 4000
    prompts, options = PROMPTS[: 1 + (batch == "ragged")], {"max_new_tokens": NUM_TOKENS + num_draft} | options
    for prompt, seen in zip(prompts, samples(decoder, prompts, num_samples, **options), strict=True):
        law = continuation_law(model, prompt, NUM_TOKENS, **options)
        assert_counts(seen, law, num_tests=len(covering()), setting=(*cell, prompt))


@pytest.mark.parametrize("acceptance", ["standard", "block", "coupled"])
def test_the_law_survives_padding_and_chunks(acceptance):
    """Padding on the right, a prompt read in chunks of two, and neighbours that end early: the same law."""
    model = TARGETS["table"]
    decoder = MTPDecoder.from_model(model, head=random_head(model), num_speculative_tokens=2, acceptance=acceptance)
    options = {"max_new_tokens": NUM_TOKENS + 2, "eos_token_id": [4], "pad_token_id": 4}
    counts = samples(decoder, PROMPTS, 4000, side="right", prefill_chunk_size=2, **options)
    for prompt, seen in zip(PROMPTS, counts, strict=True):
        assert_counts(seen, continuation_law(model, prompt, NUM_TOKENS, **options), num_tests=6, setting=(acceptance, prompt))


@pytest.mark.parametrize("num_draft", [1, 2, 3])
@pytest.mark.parametrize("rule", [StandardAcceptance(), BlockAcceptance()], ids=lambda rule: type(rule).__name__)
def test_accept_draws_what_enumeration_says(rule, num_draft):
    """`accept` with the keyed noise appends texts, of any length, with the law that enumeration gives the rule's round."""
    target_law, draft_law = rule_problems(3, seed=1)[0]
    num_rows = 20_000
    noise, start = Noise(seeds_for(0, torch.zeros(num_rows))), torch.full((num_rows,), 9)
    tokens, probs, texts = torch.zeros(num_rows, 0, dtype=torch.long), [], [()] * num_rows
    for step in range(num_draft):
        probs.append(torch.stack([draft_law(text) for text in texts]))
        drawn = race(probs[-1], noise.exponential(start + step, Purpose.DRAFT, 3))
        tokens = torch.cat([tokens, drawn[:, None]], dim=1)
        texts = [tuple(row) for row in tokens.tolist()]
    target_probs = torch.stack([torch.stack([target_law(text[:n]) for n in range(num_draft + 1)]) for text in texts])
    verdict = accept(rule, Draft(tokens, torch.stack(probs, dim=1)), target_probs, noise, start)
    rows = zip(verdict.tokens.tolist(), verdict.counts.tolist(), strict=True)
    seen = Counter(tuple(row[:count]) for row, count in rows)
    assert_counts(seen, verdict_laws(rule, [(target_law, draft_law)], num_draft)[0], num_tests=6, setting=num_draft)
