"""Sampling: the same seed is the same text, rows have streams of their own, and no neighbour reaches them.

The law itself is proved in tests/lossless.
"""

import pytest
import torch

from mtpdecode import GenerationError
from tests import tiny

LENGTH = 14
SAMPLED = {"max_new_tokens": LENGTH, "do_sample": True}
WARPERS = {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.98}
MODES = [("standard", "sample"), ("standard", "greedy"), ("block", "sample"), ("coupled", "sample")]


def new(sequences, width=9):
    return [row[width:] for row in sequences.tolist()]


@pytest.mark.parametrize(("acceptance", "draft_sampling"), MODES)
@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_seed_is_a_text(k, acceptance, draft_sampling):
    decoder = tiny.decoder("llama", k, 2, acceptance=acceptance, draft_sampling=draft_sampling)
    batch = tiny.padded(tiny.prompts())
    first = decoder.generate(**batch, **SAMPLED, **WARPERS, seed=7)
    assert torch.equal(decoder.generate(**batch, **SAMPLED, **WARPERS, seed=7), first), "seed=7 twice: two texts"
    assert not torch.equal(decoder.generate(**batch, **SAMPLED, **WARPERS, seed=8), first), "seed=8 is the text of seed=7"


@pytest.mark.parametrize("k", [0, 2])
def test_without_a_seed_torch_decides(k):
    decoder, batch = tiny.decoder("llama", k), tiny.padded(tiny.prompts())
    torch.manual_seed(3)
    first, second = (decoder.generate(**batch, **SAMPLED) for _ in range(2))
    assert not torch.equal(first, second), "two calls in a row must not repeat each other"
    torch.manual_seed(3)
    assert torch.equal(decoder.generate(**batch, **SAMPLED), first), "torch.manual_seed is not honoured"


def test_a_seed_leaves_torchs_own_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    tiny.decoder("llama", 2).generate(**tiny.padded(tiny.prompts()), **SAMPLED, seed=5)
    assert torch.equal(torch.get_rng_state(), before), "a seeded call drew from torch's generator"


@pytest.mark.parametrize(
    ("name", "acceptance", "draft_sampling"), [*(("llama", *mode) for mode in MODES), ("deepseek_v3", "standard", "sample")]
)
def test_a_seed_per_row_makes_a_row_its_own(name, acceptance, draft_sampling):
    """Alone, in a batch, in another order, beside other rows: the same text, processors and one-token prompts included."""
    decoder = tiny.decoder(name, 3, 2, acceptance=acceptance, draft_sampling=draft_sampling)
    rows, seeds, options = tiny.prompts(), [11, 12, 13, 14, 15], {**SAMPLED, "temperature": 0.9, "repetition_penalty": 1.2}
    whole = new(decoder.generate(**tiny.padded(rows), **options, seed=seeds))
    turned = new(decoder.generate(**tiny.padded(rows[::-1], "right"), **options, seed=seeds[::-1]))
    assert turned == whole[::-1], "the order of rows, or the side of the padding, changed a text"
    for row, seed, text in zip(rows, seeds, whole, strict=True):
        alone = decoder.generate(tiny.one(row), **options, seed=[seed])[0, len(row) :].tolist()
        alone += [tiny.PAD] * (len(text) - len(alone))
        assert alone == text, f"the row of seed {seed}: alone {alone}, in the batch {text}"


def test_one_int_is_a_stream_per_row():
    decoder, row = tiny.decoder("llama", 2), tiny.prompts()[0]
    texts = new(decoder.generate(**tiny.padded([row] * 4), **SAMPLED, seed=9))
    assert len(set(map(tuple, texts))) == 4, "equal prompts with one seed must not give equal rows"
    assert texts[0] == decoder.generate(tiny.one(row), **SAMPLED, seed=[9])[0, len(row) :].tolist(), "row 0 is that of [9]"


def test_coupled_text_depends_on_the_seed_alone():
    """Not on K, the head, its layers or how drafts are drawn."""
    batch, options = tiny.padded(tiny.prompts()), {**SAMPLED, **WARPERS, "seed": 4}
    plain = tiny.decoder("llama", 0, acceptance="coupled").generate(**batch, **options)
    for k, num_layers in ((1, 1), (3, 1), (5, 3)):
        decoder = tiny.decoder("llama", k, num_layers, acceptance="coupled")
        assert torch.equal(decoder.generate(**batch, **options), plain), f"K={k}, {num_layers} layers: another text"
        assert decoder.metrics.tau > 1.1, f"coupling must keep some drafts: {decoder.metrics}"
        assert torch.equal(decoder.generate(**batch, **options, draft_sampling="greedy"), plain), "drafts changed the text"


def test_little_temperature_is_greedy():
    rows = tiny.prompts()
    expected = [tiny.plain("llama", row, max_new_tokens=LENGTH) for row in rows]
    for acceptance, draft_sampling in MODES:
        decoder = tiny.decoder("llama", 3, acceptance=acceptance, draft_sampling=draft_sampling)
        sequences = decoder.generate(**tiny.padded(rows), **SAMPLED, temperature=1e-5)
        tiny.assert_rows(sequences, 9, expected, f"{acceptance}, {draft_sampling}, temperature 1e-5")
        sequences = decoder.generate(**tiny.padded(rows), **SAMPLED, top_k=1)
        tiny.assert_rows(sequences, 9, expected, f"{acceptance}, {draft_sampling}, top_k 1")


def test_sampled_rows_end_at_their_end_tokens():
    decoder, rows = tiny.decoder("llama", 3, 2), tiny.prompts(12)
    sequences = decoder.generate(**tiny.padded(rows), **SAMPLED, seed=1, eos_token_id=[11, 35, 6], pad_token_id=0)
    for text in new(sequences):
        ends = [place for place, token in enumerate(text) if token in (11, 35, 6)]
        rest = text[ends[0] + 1 :] if ends else []
        assert not any(rest), f"behind the first end token there is only padding: {text}"


@pytest.mark.parametrize("seed", [1.5, True, "7", [1, 2], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5.0], torch.tensor(3)])
def test_a_wrong_seed_is_refused(seed):
    with pytest.raises(GenerationError, match=r"(?s)seed.*(Pass one int)"):
        tiny.decoder("llama", 2).generate(**tiny.padded(tiny.prompts()), **SAMPLED, seed=seed)
