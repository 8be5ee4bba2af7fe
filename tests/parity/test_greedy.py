"""Greedy text is that of `model.generate`, whatever the head, K, the batch, the padding and the cache."""

import pytest
import torch

from mtpdecode import CropCache, MTPDecoder, NGramProposer, RaggedCache
from tests import tiny

LENGTH = 16
CHOICES = (0, 1, 2, 3, 5)


@pytest.mark.parametrize("cache", [RaggedCache, CropCache])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_one_row_for_every_head_k_and_cache(name, num_layers, cache):
    row = tiny.prompts()[0]
    expected = tiny.plain(name, row, max_new_tokens=LENGTH)
    for k in CHOICES if cache is RaggedCache else (1, 3, 5):
        decoder = tiny.decoder(name, k, num_layers, cache=cache)
        sequences = decoder.generate(tiny.one(row), max_new_tokens=LENGTH, do_sample=False)
        assert sequences.tolist() == [row + expected], f"{name}, {num_layers} layers, K={k}, {cache.__name__}: another text"


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_ragged_rows_are_each_as_if_alone(name, num_layers):
    rows = tiny.prompts()
    expected = [tiny.plain(name, row, max_new_tokens=LENGTH) for row in rows]
    for k in (1, 2, 3, 5):
        decoder = tiny.decoder(name, k, num_layers)
        sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=LENGTH, do_sample=False)
        tiny.assert_rows(sequences, 9, expected, f"{name}, {num_layers} layers, K={k}")


@pytest.mark.parametrize("side", ["right", "both"])
@pytest.mark.parametrize("name", ["llama", "sliding", "deepseek_v3"])
def test_padding_may_stand_on_any_side(name, side):
    """Plain decoding warns of padding on the right, and gives another text; ours is the row's own."""
    rows, batch = tiny.prompts(), tiny.padded(tiny.prompts(), side)
    expected = [tiny.plain(name, row, max_new_tokens=LENGTH) for row in rows]
    width = batch["input_ids"].shape[1]
    for k, num_layers in ((0, 1), (3, 1), (3, 3)):
        sequences = tiny.decoder(name, k, num_layers).generate(**batch, max_new_tokens=LENGTH, do_sample=False)
        assert torch.equal(sequences[:, :width], batch["input_ids"]), f"padding on the {side}: the prompt came back changed"
        tiny.assert_rows(sequences, width, expected, f"{name}, {num_layers} layers, K={k}, padding on the {side}")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_a_mask_is_seen_by_its_token(side):
    """transformers infers the mask from the pad token, and so do we."""
    rows, decoder = tiny.prompts(), tiny.decoder("llama", 3, 2)
    ids = tiny.padded(rows, side)["input_ids"]
    sequences = decoder.generate(ids, max_new_tokens=LENGTH, do_sample=False)
    expected = [tiny.plain("llama", row, max_new_tokens=LENGTH) for row in rows]
    tiny.assert_rows(sequences, 9, expected, f"padding on the {side}, no mask")


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_thirty_two_rows(name):
    rows = tiny.prompts(32)
    expected = [tiny.plain(name, row, max_new_tokens=12) for row in rows]
    sequences = tiny.decoder(name, 3, 2).generate(**tiny.padded(rows), max_new_tokens=12, do_sample=False)
    tiny.assert_rows(sequences, 9, expected, f"{name}, 32 rows")


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_order_of_rows_does_not_matter(num_layers):
    rows, decoder = tiny.prompts(), tiny.decoder("llama", 3, num_layers)
    there = decoder.generate(**tiny.padded(rows), max_new_tokens=LENGTH, do_sample=False)
    back = decoder.generate(**tiny.padded(rows[::-1]), max_new_tokens=LENGTH, do_sample=False)
    assert torch.equal(there, back.flip(0)), "turning the batch upside down changed a row's text"


@pytest.mark.parametrize("name", tiny.NAMES)
def test_k_zero_is_the_plain_path(name):
    """One target forward for each token, as plain decoding has, and the head is never asked."""
    row, decoder = tiny.prompts()[0], tiny.decoder(name, 0)
    asked, forwards = [], []
    hooks = [
        decoder.head.register_forward_hook(lambda *_: asked.append(1)),
        decoder.target.register_forward_hook(lambda *_: forwards.append(1)),
    ]
    try:
        sequences = decoder.generate(tiny.one(row), max_new_tokens=LENGTH, do_sample=False)
    finally:
        for hook in hooks:
            hook.remove()
    assert sequences.tolist() == [row + tiny.plain(name, row, max_new_tokens=LENGTH)], f"{name}: K=0 is another text"
    assert not asked, f"K=0 asked the head {len(asked)} times"
    assert len(forwards) == LENGTH + 1, f"{len(forwards)} target forwards; the prompt and {LENGTH} tokens need {LENGTH + 1}"
    assert decoder.metrics.tau == 1.0, f"K=0 appends one token a forward, not {decoder.metrics.tau}"


def test_k_can_be_said_per_call():
    row, decoder = tiny.prompts()[0], tiny.decoder("llama", 1)
    expected = tiny.plain("llama", row, max_new_tokens=LENGTH)
    for k in CHOICES:
        sequences = decoder.generate(tiny.one(row), max_new_tokens=LENGTH, do_sample=False, num_speculative_tokens=k)
        assert sequences.tolist() == [row + expected], f"K={k} for one call: another text"
        assert max(decoder.metrics.drafted) == k, f"K={k} was asked for, {decoder.metrics.drafted} drafted"
    decoder.generate(tiny.one(row), max_new_tokens=LENGTH, do_sample=False)
    assert max(decoder.metrics.drafted) == 1, "a call's K stayed for the next call"


def test_without_asking_k_is_what_suits_the_head():
    head = tiny.build_head(tiny.target("llama"), tiny.row_of("llama"), num_layers=2)
    assert MTPDecoder.from_model(tiny.target("llama"), head=head).options.schedule.start == 2, "a head of two layers"
    head.num_speculative_tokens = 3
    assert MTPDecoder.from_model(tiny.target("llama"), head=head).options.schedule.start == 3, "trained for three steps"


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("name", ["sliding", "mistral"])
def test_sliding_windows_across_their_border(name, num_layers):
    """The window is 8 or 16 tokens, the text up to 101: every slot falls out of sight, in each row at another time."""
    rows = tiny.prompts(4, lengths=(21, 1, 7, 8))
    expected = [tiny.plain(name, row, max_new_tokens=80) for row in rows]
    sequences = tiny.decoder(name, 3, num_layers).generate(**tiny.padded(rows), max_new_tokens=80, do_sample=False)
    tiny.assert_rows(sequences, 21, expected, f"{name} across the window")
    crop = tiny.decoder(name, 3, num_layers, cache=CropCache)
    sequences = crop.generate(tiny.one(rows[0]), max_new_tokens=80, do_sample=False)
    assert sequences.tolist() == [rows[0] + expected[0]], f"{name} across the window with CropCache"


@pytest.mark.parametrize("name", tiny.NAMES)
def test_eager_attention_gives_what_sdpa_gives(name):
    model = tiny.build(name, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    rows = tiny.prompts(4)
    expected = [tiny.plain(name, row, max_new_tokens=16) for row in rows]
    decoder = MTPDecoder.from_model(model, head=tiny.build_head(model, tiny.row_of(name), 2), num_speculative_tokens=3)
    sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=16, do_sample=False)
    tiny.assert_rows(sequences, 9, expected, f"{name} with eager attention")
    sequences = decoder.generate(tiny.one(rows[0]), max_new_tokens=16, do_sample=False)
    assert sequences.tolist() == [rows[0] + expected[0]], f"{name}, one row with eager attention"


def test_attention_may_be_changed_after_the_decoder_was_built():
    model = tiny.build("llama")
    decoder = MTPDecoder.from_model(model, head=tiny.build_head(model, tiny.row_of("llama")), num_speculative_tokens=3)
    rows = tiny.prompts(4)
    expected = [tiny.plain("llama", row, max_new_tokens=16) for row in rows]
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=16, do_sample=False)
        tiny.assert_rows(sequences, 9, expected, f"after set_attn_implementation({implementation!r})")


@pytest.mark.parametrize("name", tiny.NAMES)
def test_prompt_lookup_needs_no_head(name):
    """NGramProposer proves the seam: the same text from a proposer that knows nothing of heads."""
    rows = tiny.prompts()
    expected = [tiny.plain(name, row, max_new_tokens=LENGTH) for row in rows]
    decoder = MTPDecoder.from_model(tiny.target(name), proposer=NGramProposer(), num_speculative_tokens=3)
    sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=LENGTH, do_sample=False)
    tiny.assert_rows(sequences, 9, expected, f"{name} with NGramProposer")
    assert decoder.head is None


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_reduced_draft_vocabulary_changes_no_token(num_layers):
    """Only the draft is limited: ids outside the list are never guessed and are written all the same."""
    model, rows = tiny.target("llama"), tiny.prompts()
    some = torch.arange(0, tiny.VOCAB, 2)
    head = tiny.build_head(model, tiny.row_of("llama"), num_layers, draft_vocabulary=some)
    decoder = MTPDecoder.from_model(model, head=head, num_speculative_tokens=3)
    expected = [tiny.plain("llama", row, max_new_tokens=LENGTH) for row in rows]
    sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=LENGTH, do_sample=False)
    tiny.assert_rows(sequences, 9, expected, "drafts over even ids only")
    assert any(token % 2 for row in expected for token in row), "the text must hold ids that are never drafted"
    assert decoder.metrics.tau > 1.05, f"and yet some drafts are kept: {decoder.metrics}"


def test_choices_of_a_family_can_be_overridden_and_change_drafts_only():
    model, row = tiny.target("mimo"), tiny.prompts()[0]
    expected = tiny.plain("mimo", row, max_new_tokens=LENGTH)
    rates = set()
    for changes in ({}, {"hidden": "post_norm"}, {"recycle": "raw"}, {"combine": "embed_hidden"}):
        head = tiny.head("mimo")
        other = type(head)(model, head.spec.replace(**changes)).eval()
        other.load_state_dict(head.state_dict())
        decoder = MTPDecoder.from_model(model, head=other, num_speculative_tokens=3)
        sequences = decoder.generate(tiny.one(row), max_new_tokens=LENGTH, do_sample=False)
        assert sequences.tolist() == [row + expected], f"{changes}: another text"
        rates.add(tuple(decoder.metrics.history[0]))
    assert len(rates) > 1, "no choice changed a single draft: they are not looked at"
