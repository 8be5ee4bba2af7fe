"""acceptance="coupled": the text is a function of prompt and seed alone. Not of K, the proposer, the batch or the cache.

The targets are in float64 here, so that no rounding of logits decides a race.
"""

import pytest
import torch

from mtpdecode import CropCache, MTPDecoder, NGramProposer
from mtpdecode.testing import TableProposer, random_table
from tests.tiny import padded
from tests.toys import random_head, tiny_llama

ROWS = [[1, 2, 3, 4], [5], [0, 3, 3], [2, 2, 0, 5, 1]]
SEEDS = [11, 5, 2**38 + 1, 0]
TARGET = tiny_llama(dtype=torch.float64)
SAMPLING = {"do_sample": True, "temperature": 0.9, "top_p": 0.97, "repetition_penalty": 1.1, "max_new_tokens": 16}

PROPOSERS = {
    "head": {"head": random_head(TARGET)},
    "two-layer head": {"head": random_head(TARGET, num_layers=2)},
    "head over four tokens": {"head": random_head(TARGET, draft_vocabulary=[0, 2, 3, 5])},
    "n-gram": {"proposer": NGramProposer()},
    "table, drawn": {"proposer": TableProposer(random_table(6, seed=2))},
    "table, chosen": {"proposer": TableProposer(random_table(6, seed=2), sampled=False)},
}


def texts(decoder, rows=ROWS, seeds=SEEDS, **options):
    """The new tokens of every row."""
    batch = padded(rows)
    out = decoder.generate(**batch, seed=seeds, **(SAMPLING | options))
    return out[:, batch["input_ids"].shape[1] :].tolist()


def decoder(proposer="head", **settings):
    return MTPDecoder.from_model(TARGET, **PROPOSERS[proposer], acceptance="coupled", **settings)


PLAIN = texts(decoder("n-gram"), num_speculative_tokens=0)
"""What sampling without drafts gives for these seeds."""


def test_the_seeds_matter():
    """Rows with one prompt and different seeds differ, and another seed gives another text."""
    same_prompt = texts(decoder(), [ROWS[0]] * 4)
    assert len({tuple(text) for text in same_prompt}) == 4
    assert texts(decoder(), seeds=[seed + 1 for seed in SEEDS]) != PLAIN


@pytest.mark.parametrize("num_draft", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_text_is_that_of_plain_sampling(proposer, num_draft):
    """Whatever is drafted, and however much of it: the text that the seed gives without drafts."""
    assert texts(decoder(proposer), num_speculative_tokens=num_draft) == PLAIN


@pytest.mark.parametrize("num_draft", [1, 3])
def test_text_is_that_of_plain_sampling_with_greedy_drafts(num_draft):
    """Drafts that are the head's likeliest tokens change nothing either."""
    assert texts(decoder(), num_speculative_tokens=num_draft, draft_sampling="greedy") == PLAIN


def test_drafts_are_kept():
    """The comparison above is not empty: rounds append more than one token, and drawn drafts gain from the shared noise."""
    coupled = decoder()
    taus = []
    for draft_sampling in ("sample", "greedy"):
        texts(coupled, num_speculative_tokens=3, draft_sampling=draft_sampling)
        taus.append(coupled.metrics.tau)
    assert min(taus) > 1.1
    assert taus[0] > taus[1], taus


@pytest.mark.parametrize("acceptance", ["standard", "block"])
def test_without_drafts_every_rule_samples_alike(acceptance):
    """K = 0 is plain sampling with that seed, whatever the rule would have been."""
    assert texts(decoder(), num_speculative_tokens=0, acceptance=acceptance) == PLAIN


def test_text_does_not_depend_on_the_batch():
    """A row with its own seed has the same text in another order, alone, twice, and with padding on the other side."""
    order = [2, 0, 3, 1]
    assert texts(decoder(), [ROWS[i] for i in order], [SEEDS[i] for i in order]) == [PLAIN[i] for i in order]
    for row, seed, text in zip(ROWS, SEEDS, PLAIN, strict=True):
        assert texts(decoder(), [row], [seed]) == [text]
    assert texts(decoder(), ROWS + ROWS, SEEDS + SEEDS) == PLAIN + PLAIN
    batch = padded(ROWS, "right")
    out = decoder().generate(**batch, seed=SEEDS, **SAMPLING)
    assert out[:, batch["input_ids"].shape[1] :].tolist() == PLAIN


def test_an_int_seed_is_a_stream_per_row():
    """seed=7 gives row 0 the text of seed=[7], and the other rows numbers of their own."""
    rows = [ROWS[0]] * 3
    out = texts(decoder(), rows, 7)
    assert out[0] == texts(decoder(), rows[:1], [7])[0]
    assert len({tuple(text) for text in out}) == 3


@pytest.mark.parametrize("proposer", ["head", "two-layer head"])
def test_text_does_not_depend_on_the_cache(proposer):
    """The slow twin of the cache, row by row, gives the same texts."""
    alone = decoder(proposer, cache=CropCache, num_speculative_tokens=3)
    assert [texts(alone, [row], [seed])[0] for row, seed in zip(ROWS, SEEDS, strict=True)] == PLAIN


def test_streamed_text_is_the_same():
    """`stream` yields, piece by piece, what `generate` returns."""
    pieces = [[] for _ in ROWS]
    for chunk in decoder(num_speculative_tokens=2).stream(**padded(ROWS), seed=SEEDS, **SAMPLING):
        for piece, tokens in zip(pieces, chunk.tokens, strict=True):
            piece += tokens
    assert pieces == PLAIN


def test_no_seed_takes_torchs():
    """Without a seed the numbers come from torch's generator: `torch.manual_seed` holds, and two calls differ."""
    torch.manual_seed(3)
    first, second = texts(decoder(), seeds=None), texts(decoder(), seeds=None)
    torch.manual_seed(3)
    assert texts(decoder(), seeds=None) == first != second
