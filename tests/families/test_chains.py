"""Chained heads, a layer a depth: Step with output layers of its own, Inkling with short convolutions and learned distances."""

import copy
import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mtpdecode import GenerationError, MTPDecoder
from mtpdecode.families import FAMILIES
from mtpdecode.train import mtp_loss
from tests import tiny
from tests.families.zoo import inkling, step3p7

FAMILY = {"step3p7": step3p7, "inkling": inkling}
BOTH = pytest.mark.parametrize("family", FAMILY)
WINDOW, LONG = 32, tiny.prompts(1, seed=5, lengths=(40,))[0]


@cache
def built(family, **changes):
    """(target, head of three layers, its published tensors)"""
    model = FAMILY[family].build()
    row = next(row for row in FAMILIES if row.family == family)
    head = tiny.build_head(model, row.replace(**changes), 3)
    return model, head, FAMILY[family].published(head, model)


def twin(family, **choices):
    model, _, tensors = built(family)
    if family == "inkling":
        return inkling.Twin(model, tensors, inkling.CHAINED, **choices)
    return step3p7.Twin(model, tensors, **choices)


def rounds(model, head, text, num_speculative_tokens, monkeypatch, num_tokens=12):
    """Decode greedily; -> per round, the text that it began with and the head's logits (K, V)."""
    decoder, logits, steps = MTPDecoder.from_model(model, head=head), head.logits, []
    monkeypatch.setattr(head, "logits", lambda *args: steps.append(logits(*args)[0]) or logits(*args))
    options = {"max_new_tokens": num_tokens, "do_sample": False, "num_speculative_tokens": num_speculative_tokens}
    for chunk in decoder.stream(tiny.one(text), **options):
        yield text, torch.stack(steps)
        steps.clear()
        text = text + chunk.tokens[0]


def assert_same(found, twin):
    for text, logits in found:
        error = (logits - twin.drafts(text, len(logits))).abs().amax(-1)
        assert float(error.max()) < 1e-4, f"behind {len(text)} tokens the draft steps' logits are off by {error.tolist()}"


@BOTH
def test_logits_in_a_text_longer_than_the_window(family, monkeypatch):
    model, head, _ = built(family)
    assert_same(rounds(model, head, LONG, 3, monkeypatch), twin(family))


@BOTH
def test_past_the_last_depth_the_chain_goes_round(family, monkeypatch):
    """K = 7 of three layers: the layers take turns, and each turn has keys and states of its own."""
    model, head, _ = built(family)
    assert_same(rounds(model, head, LONG[:9], 7, monkeypatch, 20), twin(family))


def test_or_the_last_layer_goes_on_alone(monkeypatch):
    """Single steps go on where uncommitted rows end, so the convolutions must see those."""
    model, head, _ = built("inkling", beyond="last")
    assert_same(rounds(model, head, LONG[:9], 7, monkeypatch, 20), twin("inkling", beyond="last"))


@BOTH
@pytest.mark.parametrize("beyond", ["cycle", "last"])
def test_text_past_the_last_depth(family, beyond):
    model, head, _ = built(family, beyond=beyond)
    rows = tiny.prompts(4, lengths=(9, 1, 4, 7))
    expected = [tiny.alone(model, row, max_new_tokens=40) for row in rows]
    found = MTPDecoder.from_model(model, head=head).generate(
        **tiny.padded(rows), max_new_tokens=40, do_sample=False, num_speculative_tokens=7
    )
    tiny.assert_rows(found, 9, expected, f"{family}, {beyond}")


@BOTH
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ragged_rows_far_beyond_the_window(family, attention):
    """200 tokens and a window of 32, prompts in chunks of 3; and the head is as often right behind the window as before it."""
    model, head, _ = built(family)
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    head = tiny.build_head(model, head.spec, 3)
    rows = tiny.prompts(4, lengths=(9, 1, 40, 7))
    decoder = MTPDecoder.from_model(model, head=head, num_speculative_tokens=3)
    texts, sizes = [[] for _ in rows], []
    for chunk in decoder.stream(**tiny.padded(rows), max_new_tokens=200, do_sample=False, prefill_chunk_size=3):
        texts = [text + new for text, new in zip(texts, chunk.tokens, strict=True)]
        sizes.append([len(new) for new in chunk.tokens])
    for number, row in enumerate(rows):
        assert texts[number] == tiny.alone(model, row, max_new_tokens=200), f"row {number}"
    early, late = sizes[: len(sizes) // 4], sizes[len(sizes) // 2 :]
    before, behind = (sum(map(sum, part)) / sum(size > 0 for round in part for size in round) for part in (early, late))
    assert behind > 0.75 * before, f"{before:.2f} tokens a round in the beginning, {behind:.2f} later"


FAULTS = {
    "the base's output layer": lambda: twin("step3p7", own_head=False),
    "layer 0 only": lambda: twin("step3p7", layer=lambda step: 0),
    "a state behind the final norm": lambda: post_normed(twin("step3p7")),
    "an embedding that the base has not normed": lambda: twin("inkling", embed=raw_embedding),
    "scores that grow with the position": lambda: twin("inkling", scaled=True),
    "no norm in the chain": lambda: inkling.Twin(*built("inkling")[::2], inkling.CHAINED | {"chain_hidden_post_norm": False}),
    "depths that slide elsewhere": lambda: inkling.Twin(*alike(built("inkling")), inkling.CHAINED | {"local_layer_ids": []}),
}


def post_normed(twin):
    norm = twin.target.get_decoder().norm
    twin.fed = lambda ids: norm(step3p7.pre_norm_states(twin.target, ids))
    return twin


def raw_embedding(ids):
    return built("inkling")[0].state_dict()["model.language_model.embed_tokens.weight"][ids]


def alike(parts):
    """The tensors of Inkling with those of a full layer in the depth that slides, which has other heads."""
    model, _, tensors = parts
    first, second = "model.mtp.layers.0.", "model.mtp.layers.1."
    return model, tensors | {name.replace(first, second): tensor for name, tensor in tensors.items() if name.startswith(first)}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_twins_can_tell(fault, monkeypatch):
    """What a wrong reading of the family would compute is far from what the head does: in the first step, or in the second."""
    wrong = FAULTS[fault]()
    family = "step3p7" if isinstance(wrong, step3p7.Twin) else "inkling"
    model, head, _ = built(family)
    text, logits = next(rounds(model, head, LONG, 3, monkeypatch))
    error = (logits - wrong.drafts(text, 3)).abs().amax(-1)
    assert float(error[:2].max()) > 1e-2, f"{fault} changes the logits by {error.tolist()} only"


def test_without_its_own_positions_a_ragged_row_would_go_astray(monkeypatch):
    model, head, _ = built("inkling")
    rows = tiny.prompts(2, lengths=(9, 30))
    expected = [tiny.alone(model, row, max_new_tokens=30) for row in rows]
    monkeypatch.setattr("mtpdecode.distances.LEARNED", ())
    found = MTPDecoder.from_model(model, head=head).generate(**tiny.padded(rows), max_new_tokens=30, do_sample=False)
    assert found[:, 30:].tolist() != expected, "else the other tests of ragged rows would show nothing"


def test_a_depth_of_step_that_does_not_slide(monkeypatch):
    """The published lists go on for the head, and say what each depth is: such a layer has fewer heads and turns more slowly."""
    types = [*step3p7.TEXT["layer_types"][:4], "full_attention", "sliding_attention"]
    lists = {"rope_theta": [5e6, 1e4, 5e6, 1e4, 5e6, 1e4], "partial_rotary_factors": [0.5, 1.0, 0.5, 1.0, 0.5, 1.0]}
    monkeypatch.setattr(step3p7, "TEXT", step3p7.TEXT | lists | {"layer_types": types})
    model = step3p7.build()
    head = tiny.build_head(model, next(row for row in FAMILIES if row.family == "step3p7"), 3)
    assert [layer.block.self_attn.num_heads for layer in head.layers] == [6, 4, 6]
    found = rounds(model, head, LONG, 3, monkeypatch)
    assert_same(found, step3p7.Twin(model, step3p7.published(head, model)))


def test_step_without_its_vision_tower(tmp_path):
    """Step-3.5 is the text model alone, for which transformers has no class: it is loaded as the text of Step-3.7."""
    model, head, tensors = built("step3p7")
    copy.deepcopy(model).save_pretrained(tmp_path)
    text = load_file(tmp_path / "model.safetensors").items()
    text = {name: tensor for name, tensor in text if not name.startswith(("vision_model.", "vit_"))}
    save_file(text | tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(step3p7.text_config({})))
    decoder = MTPDecoder.from_pretrained(tmp_path)
    for name, tensor in model.get_decoder().state_dict().items():
        assert torch.equal(decoder.target.get_decoder().state_dict()[name], tensor), name
    for name, tensor in head.state_dict().items():
        assert torch.equal(decoder.head.state_dict()[name], tensor), name
    expected = tiny.alone(model, LONG, max_new_tokens=20)
    assert decoder.generate(tiny.one(LONG), max_new_tokens=20, do_sample=False).tolist() == [LONG + expected]
    decoder.save_pretrained(tmp_path / "again")
    again = MTPDecoder.from_pretrained(tmp_path / "again")
    assert again.generate(tiny.one(LONG), max_new_tokens=20, do_sample=False).tolist() == [LONG + expected]


@BOTH
def test_training_sees_what_drafting_sees(family):
    """The first step's loss is that of the twin's logits behind every token; each step trains its own layer."""
    model, head, _ = built(family)
    ids = LONG[:12]
    head.zero_grad()
    losses = mtp_loss(head, model, tiny.one(ids), num_steps=4, decay=1.0)
    rows = [twin(family).drafts(ids[: end + 1], 1)[0] for end in range(1, len(ids) - 1)]
    wanted = F.cross_entropy(torch.stack(rows), torch.tensor(ids[2:]))
    assert abs(float(4 * losses[0].detach() - wanted)) < 1e-4
    losses[:2].sum().backward()
    learns = [any(bool(own.grad is not None and own.grad.any()) for own in layer.block.parameters()) for layer in head.layers]
    assert learns == [True, True, False]
    losses = mtp_loss(head, model, tiny.one(ids), num_steps=4, decay=1.0)
    head.zero_grad()
    losses[3].backward()
    assert head.layers[2].proj.weight.grad.any()
    assert head.layers[0].norm_embed.weight.grad.any(), "the fourth step goes through the first layer again"
    head.zero_grad()


@BOTH
def test_images_are_refused(family):
    model, head, _ = built(family)
    decoder = MTPDecoder.from_model(model, head=head)
    with pytest.raises(GenerationError, match="pixel_values"):
        decoder.generate(tiny.one(LONG), pixel_values=torch.zeros(1, 3, 28, 28), max_new_tokens=2)


def test_a_short_layout_of_inkling(tmp_path):
    """A scale that is 1 may be left out; gate and up lie in one matrix, in which their rows take turns, also in what we write."""
    model, head, tensors = built("inkling")
    copy.deepcopy(model).save_pretrained(tmp_path)
    target = load_file(tmp_path / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith("global_scale")}
    save_file(target | left, tmp_path / "model.safetensors", {"format": "pt"})
    decoder = MTPDecoder.from_pretrained(tmp_path)
    for name, tensor in head.state_dict().items():
        wanted = torch.ones(1) if name.endswith("global_scale") else tensor
        assert torch.equal(decoder.head.state_dict()[name], wanted), name
    MTPDecoder.from_model(model, head=head).save_pretrained(tmp_path / "saved")
    written = load_file(tmp_path / "saved" / "model-mtp.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor), name
