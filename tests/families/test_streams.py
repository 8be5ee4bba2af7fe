"""Heads over several residual streams: what the zoo's promises do not say of them."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mtpdecode import HeadWeightsError, MTPDecoder, MTPHead, UnsupportedModelError
from mtpdecode.checkpoint import Checkpoint, num_head_layers
from mtpdecode.families import FAMILIES
from tests import tiny
from tests.families.zoo import deepseek_v4, hy_v4, qwen4_exp

ROWS = {row.family: row for row in FAMILIES}

DEEPSEEKS_OWN = {
    "model.embed_tokens.weight": "embed.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}


def deepseeks_own(name):
    """What transformers calls a tensor of DeepSeek-V4 in a file it wrote -> what DeepSeek calls it."""
    return DEEPSEEKS_OWN.get(name, name.removeprefix("model.").replace(".attn.norm.", ".attn.kv_norm."))


def written(folder, family, **extra):
    """DeepSeek-V4 or HY-V4 with its head, as published. extra: tensors besides. -> (folder, target, head)"""
    model = family.build()
    head = tiny.build_head(model, ROWS[family.CASES[0].family])
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if family is deepseek_v4:
        tensors = {deepseeks_own(name): tensor for name, tensor in tensors.items()}
    save_file(tensors | family.published(head, model) | extra, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(family.CASES[0].config(json.loads(path.read_text()))))
    return folder, model, head


def test_deepseek_v4_under_deepseeks_own_names(tmp_path):
    folder, model, head = written(tmp_path, deepseek_v4)
    names = set(load_file(folder / "model.safetensors"))
    assert {"embed.weight", "norm.weight", "head.weight", "layers.1.attn.indexer.compressor.ape", "mtp.0.hc_head_fn"} <= names
    decoder = MTPDecoder.from_pretrained(folder)
    for ours, theirs in ((model, decoder.target), (head, decoder.head)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(theirs.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", [deepseek_v4, hy_v4], ids=lambda family: family.CASES[0].name)
def test_what_the_target_keeps_in_float32_is_so_in_the_head(family, tmp_path):
    """In bfloat16, as released: hyper-connections, mixers, sinks, and in HY-V4 the output layer."""
    decoder = MTPDecoder.from_pretrained(written(tmp_path, family)[0], dtype=torch.bfloat16)
    layer, target = decoder.head.layers[0], decoder.target
    assert layer.norm_out.weight.dtype == target.get_input_embeddings().weight.dtype == torch.bfloat16
    theirs = {name: tensor.dtype for name, tensor in target.model.layers[-1].state_dict().items()}
    ours = {name: tensor.dtype for name, tensor in layer.block.state_dict().items()}
    assert ours == {name: theirs[name] for name in ours}
    assert set(ours.values()) == {torch.bfloat16, torch.float32}
    if family is deepseek_v4:
        assert {tensor.dtype for tensor in layer.mixer.parameters()} == {torch.float32}
    if family is deepseek_v4 and transformers.__version__.startswith("5.17."):
        pytest.skip("the DeepSeek-V4 of transformers 5.17 does not run in bfloat16, with model.generate neither")
    row = tiny.prompts()[0]
    assert decoder.generate(tiny.one(row), max_new_tokens=8, do_sample=False).shape == (1, len(row) + 8)


def test_a_quantised_deepseek_v4_is_called_so(tmp_path):
    """As it is released: matrices in 8 bits, each with its scales beside it."""
    folder, *_ = written(tmp_path, deepseek_v4, **{"mtp.0.attn.wq_a.scale": torch.ones(1, 1)})
    with pytest.raises(HeadWeightsError, match=r"mtp\.0\.attn\.wq_a\.scale"):
        MTPDecoder.from_pretrained(folder)


@pytest.mark.parametrize(("said", "found"), [(1, 1), (2, 1), (0, 0)])
def test_the_layers_of_hy_v4_are_those_that_are_there(said, found, tmp_path):
    folder, *_ = written(tmp_path, hy_v4)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": said}))
    assert num_head_layers(Checkpoint(folder), ROWS["hy_v4"]) == found


def test_a_target_with_one_stream_cannot_feed_several():
    with pytest.raises(UnsupportedModelError, match="several residual streams"):
        MTPHead(tiny.target("llama"), ROWS["llama"].replace(hidden="streams", streams="num_hidden_layers", recycle="raw"))


def test_what_is_fed_and_recycled_is_as_wide_as_all_streams():
    for family, num in ((deepseek_v4, deepseek_v4.STREAMS), (qwen4_exp, qwen4_exp.STREAMS), (hy_v4, 1)):
        head = MTPHead(family.build(), ROWS[family.CASES[0].family])
        assert head.width == num * tiny.SIZE


def norm(head, streams):
    """What becomes of streams (B, T, streams * D) when they are normed."""
    with torch.no_grad():
        return head.layers[0]._normed_streams(streams)


def test_streams_are_normed_one_by_one_or_together():
    """Engines disagree about Qwen4-exp: the norm over all streams, or over each with its own part of the weight."""
    model, row = qwen4_exp.build(), ROWS["qwen4_exp"]
    joint, grouped = MTPHead(model, row), MTPHead(model, row.replace(stream_norm="grouped"))
    weight = 0.1 * torch.randn(joint.width, generator=torch.Generator().manual_seed(0))
    for head in (joint, grouped):
        head.layers[0].norm_hidden.weight.data.copy_(weight)
    loud, still = torch.tensor([9.0, 3.0]).repeat_interleave(tiny.SIZE), torch.tensor([3.0, 3.0]).repeat_interleave(tiny.SIZE)
    assert torch.allclose(norm(grouped, loud[None, None]), norm(grouped, still[None, None])), "each stream has its own loudness"
    assert torch.allclose(norm(grouped, still[None, None]).flatten(), 1 + weight, atol=1e-4)
    first, second = norm(joint, loud[None, None])[0, 0] / (1 + weight).view(2, tiny.SIZE)
    assert torch.allclose(first, 3 * second), "together, the louder one stays louder"
