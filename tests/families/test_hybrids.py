"""Hybrid targets, which transformers refuses to speculate on: prompts in pieces, wrappers, other attention, what is refused."""

import pytest
import torch
from transformers import DynamicCache, Qwen3_5ForConditionalGeneration
from transformers.modeling_layers import MtpModel

from mtpdecode import MTPDecoder, MTPHead, UnsupportedModelError
from mtpdecode.families import FAMILIES
from mtpdecode.recurrent import RecurrentLayer
from mtpdecode.train import mtp_loss, target_hidden
from tests import tiny
from tests.families.layouts import qwen_layout, twin_of
from tests.families.test_zoo import write_case
from tests.families.zoo import qwen3_5, qwen3_5_moe, qwen3_next

LENGTHS, NUM_TOKENS = (30, 1, 17, 2), 24
ROW = next(row for row in FAMILIES if row.family == "qwen3_5")


def rows():
    return tiny.prompts(len(LENGTHS), lengths=LENGTHS)


@pytest.fixture(scope="module")
def model():
    return qwen3_5.build()


@pytest.fixture(scope="module")
def head(model):
    return tiny.build_head(model, ROW)


@pytest.fixture(scope="module")
def decoder(model, head):
    return MTPDecoder.from_model(model, head=head, num_speculative_tokens=3)


@pytest.fixture(scope="module")
def expected(model):
    return [tiny.alone(model, row, max_new_tokens=NUM_TOKENS) for row in rows()]


@pytest.mark.parametrize("chunk", [1, 3, 7, None])
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_in_pieces_and_padded_on_either_side(chunk, side, decoder, expected):
    """Rows whose prompts end in different pieces: what lies behind a row's end must not reach its state."""
    batch, pieces = tiny.padded(rows(), side), {"prefill_chunk_size": chunk} if chunk else {}
    found = decoder.generate(**batch, max_new_tokens=NUM_TOKENS, do_sample=False, **pieces)
    tiny.assert_rows(found, max(LENGTHS), expected, f"pieces of {chunk}, padded on the {side}")


def test_long_texts_do_not_drift(decoder, model):
    """200 tokens, ragged: the text of each row alone, and states that a fresh reading of it comes to."""
    texts, options = rows(), {"max_new_tokens": 200, "do_sample": False}
    found = decoder.generate(**tiny.padded(texts), **options)
    expected = [tiny.alone(model, row, **options) for row in texts]
    tiny.assert_rows(found, max(LENGTHS), expected, "200 tokens")
    for row, (text, new) in enumerate(zip(texts, expected, strict=True)):
        states = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tiny.one((text + new)[:-1]), **{tiny.CACHE: states})
        for ours, theirs in zip(decoder.cache.window(1).cache.layers[:2], states.layers[:2], strict=True):
            error = float((ours.recurrent_states[0][row] - theirs.recurrent_states[0][0]).abs().max())
            assert error < 1e-4, f"row {row}: off by {error:.1e} after {len(new)} tokens"


def test_whole_pieces_of_a_prompt_are_not_held_in_memory(decoder, monkeypatch):
    """What projections put out is recorded where rows may keep less than the window: in the last piece, and in rounds."""
    heard, hear, text = set(), RecurrentLayer._hear, tiny.prompts(1, lengths=(64,))

    def watched(layer, *args):
        hear(layer, *args)
        heard.update(output.shape[1] for output in layer._recorded.values())

    monkeypatch.setattr(RecurrentLayer, "_hear", watched)
    found = decoder.generate(tiny.one(text[0]), max_new_tokens=8, do_sample=False, prefill_chunk_size=25)
    assert heard == {13, 4}, "pieces of 25, 25 and 13 tokens, and windows of 4"
    assert found[0, 64:].tolist() == tiny.alone(decoder.target, text[0], max_new_tokens=8)


@pytest.mark.parametrize("num_speculative_tokens", [0, 6, 20])
def test_drafts_of_every_length(num_speculative_tokens, decoder, expected):
    """None at all (one token a window), more than the convolution reaches, and more than are replayed token by token."""
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "num_speculative_tokens": num_speculative_tokens}
    tiny.assert_rows(decoder.generate(**tiny.padded(rows()), **options), max(LENGTHS), expected, f"K={num_speculative_tokens}")


def test_eager_attention(head, expected):
    model = qwen3_5.build(attn_implementation="eager")
    own = MTPHead(model, ROW).eval()
    own.load_state_dict(head.state_dict())
    found = MTPDecoder.from_model(model, head=own, num_speculative_tokens=3)
    text = found.generate(**tiny.padded(rows()), max_new_tokens=NUM_TOKENS, do_sample=False)
    tiny.assert_rows(text, max(LENGTHS), expected, "eager attention")


def test_states_in_half_precision(head):
    """bfloat16: the recurrence itself stays in float32, and every row's text is that of the row alone."""
    model = qwen3_5.build().to(torch.bfloat16)
    own = MTPHead(model, ROW).eval()
    own.load_state_dict(head.state_dict())
    decoder = MTPDecoder.from_model(model, head=own, num_speculative_tokens=3)
    out = decoder.generate(**tiny.padded(rows()), max_new_tokens=8, do_sample=False)
    layers = [layer for layer in decoder.cache.window(1).cache.layers if isinstance(layer, RecurrentLayer)]
    assert {layer.recurrent_states[0].dtype for layer in layers} == {torch.float32}
    assert {layer.conv_states[0].dtype for layer in layers} == {torch.bfloat16}
    assert out.shape == (len(LENGTHS), max(LENGTHS) + 8)


def test_the_model_is_left_as_it_was(decoder, model):
    """No hook stays behind, not even where the forward pass fails; and no cache of a call lives on in a mixer."""
    decoder.generate(tiny.one(rows()[0]), max_new_tokens=4, do_sample=False)
    layer = model.model.layers[-1]
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decoder.generate(tiny.one(rows()[0]), max_new_tokens=4, do_sample=False)
    handle.remove()
    assert not [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    assert all("linear_attn" in dict(layer.named_children()) for layer in model.model.layers[:2])


# ── wrappers ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    """The class with vision, around the checkpoint that holds its head."""
    case = next(case for case in qwen3_5.CASES if case.name == "qwen3_5-vision")
    return Qwen3_5ForConditionalGeneration.from_pretrained(write_case(tmp_path_factory.mktemp("wrapped") / "model", case))


def test_text_in_the_class_that_reads_images_too(wrapped):
    decoder, texts = MTPDecoder.from_model(wrapped, num_speculative_tokens=2), rows()
    batch = tiny.padded(texts)
    found = decoder.generate(**batch, mm_token_type_ids=torch.zeros_like(batch["input_ids"]), max_new_tokens=12, do_sample=False)
    assert type(decoder.target) is Qwen3_5ForConditionalGeneration
    tiny.assert_rows(found, max(LENGTHS), [tiny.alone(wrapped, row, max_new_tokens=12) for row in texts], "with vision")
    assert decoder.metrics.tau > 1.2, "the head was read from beside the language model"


# ── heads ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("build", [qwen3_5.build, qwen3_next.build])
def test_the_block_is_full_attention_wherever_the_base_ends(build):
    """The base's last layer need not be one."""
    model = build(layer_types=["linear_attention", "full_attention", "linear_attention"])
    row = next(row for row in FAMILIES if model.config.model_type in row.model_types)
    assert "self_attn" in dict(MTPHead(model, row).layers[0].block.named_children())


@pytest.mark.parametrize("case", [*qwen3_5.CASES, *qwen3_5_moe.CASES, *qwen3_next.CASES], ids=lambda case: case.name)
def test_the_plain_twins_are_transformers_own_head(case):
    """transformers can build a head for a hybrid and cannot speculate with it: the twins of the zoo say the same."""
    if not {"forward_layer"} <= set(vars(MtpModel)):
        pytest.skip("the MtpModel of transformers 5.17 takes no single draft step")
    model = case.build()
    head = tiny.build_head(model, next(row for row in FAMILIES if row.family == case.family))
    tensors = {name: tensor.detach() for name, tensor in case.published(head, model).items()}
    text, theirs = rows()[0], twin_of(qwen_layout(), types="full_attention")
    with torch.no_grad():
        error = float((case.drafts(model, tensors, text, 3) - theirs(model, tensors, text, 3)).abs().max())
    assert error < 1e-4, f"off by {error:.1e}"


def test_a_recurrent_block_is_refused():
    model = qwen3_5.build(layer_types=["full_attention", "linear_attention", "linear_attention"])
    with pytest.raises(UnsupportedModelError, match=r"Qwen3_5GatedDeltaNet.*replace\(block_layer_type='full_attention'\)"):
        MTPHead(model, ROW.replace(block_layer_type=None))


def test_training_reads_the_same_hidden_states(model, head):
    ids = torch.tensor([rows()[0], rows()[0][::-1]])
    with torch.no_grad():
        wanted = model.model(ids).last_hidden_state
    assert float((target_hidden(head, model, ids) - wanted).abs().max()) < 1e-5
    loss = mtp_loss(head, model, ids, num_steps=2)
    assert loss.isfinite().all()
    assert loss.requires_grad
