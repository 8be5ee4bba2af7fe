"""Packed weights say what plain ones say, follow every change of them, and are nowhere to be found behind a round."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtpdecode import MTPDecoder, packing
from mtpdecode.packing import PackedLinear, Packing, can_pack
from tests import tiny

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this PyTorch packs no weights")
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(dtype)]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def linear(dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(24, 40, bias=bias).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 24), (2, 5, 24), (2, 300, 24), (0, 24)])
def test_says_what_the_linear_says(dtype, bias, shape):
    layer, x = linear(dtype, bias), torch.randn(shape).to(dtype)
    found, expected = PackedLinear(layer)(x), F.linear(x, layer.weight, layer.bias)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2.0),
    "through data, which counts no versions": lambda layer: layer.weight.data.mul_(2.0),
    "another tensor": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2.0)),
    "new data": lambda layer: setattr(layer.weight, "data", layer.weight * 2.0),
    "the bias": lambda layer: layer.bias.add_(1.0),
    "another bias": lambda layer: setattr(layer, "bias", nn.Parameter(layer.bias + 1.0)),
    "an optimizer's step": lambda layer: _step(layer),
}


def _step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    with torch.enable_grad():
        layer(torch.ones(24)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_follows_a_changed_weight(change):
    layer, x = linear(), torch.randn(3, 24)
    packed = Packing([layer])
    before = layer(x)
    CHANGES[change](layer)
    expected = F.linear(x, layer.weight, layer.bias)
    assert not torch.allclose(before, expected), "the change shows"
    packed.renew()
    with packed.used():
        torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_what_did_not_change_is_not_packed_again(monkeypatch):
    packed = Packing([linear(), linear()])
    monkeypatch.setattr(packing, "_WEIGHTS", None)
    packed.renew()
    with packed.used():
        pass


def test_stands_in_only_inside():
    layer = linear()
    packed = Packing([nn.Sequential(layer)])
    before = dict(vars(layer))
    with packed.used():
        assert isinstance(layer.forward, PackedLinear)
    assert vars(layer) == before
    with pytest.raises(ZeroDivisionError), packed.used():
        raise ZeroDivisionError
    assert vars(layer) == before


def test_two_decoders_share_a_copy_which_goes_with_the_model():
    gc.collect()  # models that earlier tests left
    layer, known = linear(), set(packing._WEIGHTS)
    packings = [Packing([layer]), Packing([layer])]
    assert len(set(packing._WEIGHTS) - known) == 1
    assert packings[0].num_bytes == layer.weight.nbytes
    del packings, layer
    gc.collect()
    assert set(packing._WEIGHTS) == known


class Louder(nn.Linear):
    """A Linear of somebody's own."""


def test_only_plain_linears_are_packed():
    offloaded, other = linear(), Louder(4, 4)
    offloaded.forward = lambda x: x
    assert not Packing([nn.ModuleList([offloaded, other, linear(torch.float64), nn.Embedding(4, 4)])]).num_bytes


def test_a_hook_on_a_packed_linear_is_called():
    layer, heard = linear(), []
    layer.register_forward_hook(lambda *args: heard.append(args))
    with Packing([layer]).used():
        layer(torch.randn(2, 24))
    assert len(heard) == 1


@pytest.mark.parametrize("name", ["llama", "sliding", "mimo", "deepseek_v3"])
@pytest.mark.parametrize("num_drafted", [0, 2])
def test_greedy_text_is_that_of_plain_decoding(name, num_drafted):
    rows = tiny.prompts()
    decoder = MTPDecoder.from_model(tiny.target(name), head=tiny.head(name, 2), num_speculative_tokens=num_drafted, packed=True)
    sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=40, do_sample=False)
    tiny.assert_rows(sequences, 9, [tiny.plain(name, row, max_new_tokens=40) for row in rows], "packed")
    assert decoder.packing.num_bytes
    assert not any("forward" in vars(module) for module in decoder.target.modules())


def test_a_draft_vocabulary_is_packed_too():
    head = tiny.head("llama")
    full = MTPDecoder.from_model(tiny.target("llama"), head=head, packed=True)
    some = MTPDecoder.from_model(tiny.target("llama"), head=head, packed=True, draft_vocabulary=8)
    weight = tiny.target("llama").get_output_embeddings().weight
    assert some.packing.num_bytes - full.packing.num_bytes == 8 * weight.shape[1] * 4


@torch.no_grad()
def test_a_decoder_follows_a_changed_model():
    target, ids = tiny.build("llama"), torch.tensor([[3, 4, 5, 6]])
    decoder = MTPDecoder.from_model(
        target, head=tiny.build_head(target, tiny.row_of("llama")), packed=True, num_speculative_tokens=1
    )
    options = {"max_new_tokens": 12, "do_sample": False}
    before = decoder.generate(ids, **options)
    for parameter in target.parameters():
        parameter.data.copy_(parameter.flip(0))
    assert torch.equal(decoder.generate(ids, **options), target.generate(ids, **options))
    assert not torch.equal(decoder.generate(ids, **options), before)
