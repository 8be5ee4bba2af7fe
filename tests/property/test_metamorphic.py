"""What must not change the text: K, the order of the rows, their neighbours, the side of the padding, how the prompt is read.

Greedy texts are compared token by token; sampled ones too, since the noise is keyed by seed and position.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpdecode import GenerationError, MTPDecoder, NGramProposer
from tests.tiny import build, build_head, one, padded, prompts, row_of

SETTINGS = settings(max_examples=8, deadline=None, derandomize=True, database=None)
NAMES = ("llama", "sliding", "deepseek_v3")
LENGTH = 14

MODELS = {name: build(name) for name in NAMES}
DECODERS = {name: MTPDecoder.from_model(MODELS[name], head=build_head(MODELS[name], row_of(name), 2)) for name in NAMES}
ROWS = prompts()
GREEDY = {"do_sample": False, "repetition_penalty": 1.3}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 12}


def texts(decoder, rows, side="left", **options):
    """The new tokens of every row, padding cut off."""
    batch = padded(rows, side)
    out = decoder.generate(**batch, **({"max_new_tokens": LENGTH, "eos_token_id": None} | options))
    return out[:, batch["input_ids"].shape[1] :].tolist()


PLAIN = {
    name: [
        MODELS[name]
        .generate(one(row), attention_mask=torch.ones(1, len(row)), max_new_tokens=LENGTH, eos_token_id=None, **GREEDY)[
            0, len(row) :
        ]
        .tolist()
        for row in ROWS
    ]
    for name in NAMES
}
"""What transformers' own greedy loop gives for each row alone."""


@pytest.mark.parametrize("name", NAMES)
@SETTINGS
@given(data=st.data())
def test_greedy_text_is_plain_text(name, data):
    """Any K, any choice and order of rows, either padding, prompts read in chunks of any size: the text of plain decoding."""
    which = data.draw(st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=6))
    options = {
        "num_speculative_tokens": data.draw(st.integers(0, 6)),
        "prefill_chunk_size": data.draw(st.sampled_from([1, 2, 3, 5, 64])),
        "side": data.draw(st.sampled_from(["left", "right", "both"])),
    }
    assert texts(DECODERS[name], [ROWS[row] for row in which], **GREEDY, **options) == [PLAIN[name][row] for row in which]


@pytest.mark.parametrize("acceptance", ["standard", "block", "coupled"])
@SETTINGS
@given(data=st.data())
def test_sampled_text_moves_with_its_row(acceptance, data):
    """With a seed per row: other neighbours, another order, padding and chunks leave each row its text, at any K."""
    which = data.draw(st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=6))
    num_draft, seeds = data.draw(st.integers(0, 4)), [7, 7, 8, 2**38, 0]
    shared = {"acceptance": acceptance, "num_speculative_tokens": num_draft, **SAMPLED}
    moved = {
        "prefill_chunk_size": data.draw(st.sampled_from([1, 3, 64])),
        "side": data.draw(st.sampled_from(["left", "right", "both"])),
    }
    still = texts(DECODERS["llama"], ROWS, seed=seeds, **shared)
    found = texts(DECODERS["llama"], [ROWS[row] for row in which], seed=[seeds[row] for row in which], **shared, **moved)
    assert found == [still[row] for row in which]


@SETTINGS
@given(lengths=st.lists(st.integers(0, 5), min_size=2, max_size=2), seed=st.integers(0, 2**39))
def test_coupled_text_does_not_know_k(lengths, seed):
    """acceptance="coupled": two K, two proposers, one text."""
    looked_up = MTPDecoder.from_model(MODELS["llama"], proposer=NGramProposer())
    shared = {"acceptance": "coupled", "seed": seed, **SAMPLED}
    first = texts(DECODERS["llama"], ROWS, num_speculative_tokens=lengths[0], **shared)
    assert first == texts(looked_up, ROWS, num_speculative_tokens=lengths[1], **shared)


@SETTINGS
@given(num_draft=st.integers(0, 6), budget=st.integers(1, 20), do_sample=st.booleans())
def test_counts_are_in_range(num_draft, budget, do_sample):
    """Every round appends 1 to K + 1 tokens to a row that goes on, and together they are the text, to the token."""
    decoder = DECODERS["llama"]
    out = decoder.generate(
        **padded(ROWS), max_new_tokens=budget, num_speculative_tokens=num_draft, do_sample=do_sample, seed=3, pad_token_id=0
    )
    metrics, eos = decoder.metrics, decoder.target.config.eos_token_id
    assert all(1 <= count <= num_draft + 1 for row in metrics.history for count in row)
    assert set(metrics.drafted) == {num_draft}
    for counts, row in zip(metrics.history, out[:, max(map(len, ROWS)) :].tolist(), strict=True):
        text = row[: row.index(eos) + 1] if eos in row else row
        assert sum(counts) == len(text) <= budget


def test_a_mask_that_nobody_gave_may_have_no_hole():
    """Without a mask transformers hides every padding token; inside of a prompt that would be another prompt: refused."""
    with pytest.raises(GenerationError, match="hole"):
        DECODERS["llama"].generate(torch.tensor([[5, 0, 7]]), max_new_tokens=2, pad_token_id=0)
