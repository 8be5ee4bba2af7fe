"""Packed weights say what plain ones say, follow every change of them, and are nowhere to be found behind a round."""

import gc
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtpdecode import MTPDecoder, packing
from mtpdecode.packing import PackedLinear, Packing, Product
from mtpdecode.ways import Way, can_pack
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
    found, expected = Product([layer], Way()).parts[0](x), F.linear(x, layer.weight, layer.bias)
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
    layer = linear()
    packings = [Packing([layer]), Packing([layer])]
    numbers = {product.number for packing in packings for _, product in packing._products}
    assert len(numbers) == 1
    assert numbers <= set(packing._WEIGHTS)
    assert packings[0].num_bytes == layer.weight.nbytes
    del packings, layer
    gc.collect()
    assert not numbers & set(packing._WEIGHTS), "other tests' models may go meanwhile: these alone are looked at"


class Attention(nn.Module):
    """Siblings that are given one input, and one Linear that is not."""

    def __init__(self, bias=(False, False, False), widths=(24, 24, 24), dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        for name, has_bias, width, num_out in zip("qkv", bias, widths, (40, 16, 8), strict=True):
            setattr(self, f"{name}_proj", nn.Linear(width, num_out, bias=has_bias).to(dtype))
        self.o_proj = nn.Linear(40, 24).to(dtype)

    def forward(self, x):
        return self.o_proj(self.q_proj(x)), self.k_proj(x), self.v_proj(x)


def products(run):
    """How many packed products a call makes -> its result, the number."""
    with patch.object(packing, "_packed_linear", wraps=packing._packed_linear) as multiplied:
        return run(), multiplied.call_count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [(True,) * 3, (False,) * 3])
@torch.no_grad()
def test_siblings_are_one_product(dtype, bias):
    layer, x = Attention(bias, dtype=dtype), torch.randn(2, 3, 24).to(dtype)
    expected = layer(x)
    with Packing([layer]).used():
        found, num_products = products(lambda: layer(x))
        again, _ = products(lambda: layer(x))
    assert num_products == 2, "q, k and v in one, o in another"
    for each, other, wanted in zip(found, again, expected, strict=True):
        torch.testing.assert_close(each, wanted, rtol=CLOSE[dtype], atol=CLOSE[dtype])
        assert torch.equal(each, other)
    assert packing._LAST.product is packing.NOTHING, "nothing is kept alive"


@pytest.mark.parametrize("unlike", [{"bias": (True, False, True)}, {"widths": (24, 24, 12)}])
@torch.no_grad()
def test_what_is_no_sibling_is_a_product_of_its_own(unlike):
    layer = Attention(**unlike)
    with Packing([layer]).used():
        inputs = {name: torch.randn(3, child.in_features) for name, child in layer.named_children()}
        found, num_products = products(lambda: {name: child(inputs[name]) for name, child in layer.named_children()})
    assert num_products == 4
    for name, child in layer.named_children():
        torch.testing.assert_close(found[name], child(inputs[name]))


ORDERS = {
    "each another input": [("q", 0), ("k", 1), ("v", 2)],
    "one input again": [("q", 0), ("q", 0), ("k", 0), ("k", 0)],
    "another input in between": [("q", 0), ("k", 1), ("v", 0), ("k", 0)],
    "backwards": [("v", 0), ("k", 0), ("q", 0)],
    "one alone, then all": [("k", 0), ("q", 1), ("k", 1), ("v", 1)],
}


@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_siblings_that_are_called_otherwise_are_right_too(order):
    layer, inputs = Attention(), [torch.randn(2, 24) for _ in range(3)]
    with Packing([layer]).used():
        for name, at in ORDERS[order]:
            each = getattr(layer, f"{name}_proj")
            torch.testing.assert_close(each(inputs[at]), F.linear(inputs[at], each.weight, each.bias))


@torch.no_grad()
def test_an_input_that_was_overwritten_is_multiplied_again():
    layer, x = Attention(), torch.randn(2, 24)
    with Packing([layer]).used():
        layer.q_proj(x)
        x.add_(1.0)
        torch.testing.assert_close(layer.k_proj(x), F.linear(x, layer.k_proj.weight))


@torch.no_grad()
def test_siblings_follow_a_change_of_one():
    layer, x = Attention(), torch.randn(3, 24)
    packed = Packing([layer])
    layer.k_proj.weight.data.mul_(2.0)
    packed.renew()
    with packed.used():
        torch.testing.assert_close(layer.k_proj(x), F.linear(x, layer.k_proj.weight))


@torch.no_grad()
def test_siblings_are_one_product_in_a_graph():
    """What is remembered between siblings is gone when the graph ends: a second input is no other graph."""
    layer, graphs = Attention(), []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(lambda x: layer(x), backend=backend, fullgraph=True)
    with Packing([layer]).used():
        for x in torch.randn(3, 2, 24):
            for found, child in zip(compiled(x)[1:], (layer.k_proj, layer.v_proj), strict=True):
                torch.testing.assert_close(found, F.linear(x, child.weight))
    assert len(graphs) == 1
    assert graphs[0].count("ops.mtpdecode.packed_linear(") == 2


def test_a_decoder_of_some_siblings_has_a_copy_of_its_own():
    layer = Attention()
    whole, part = Packing([layer]), Packing([layer.q_proj])
    assert part.num_bytes == layer.q_proj.weight.nbytes
    x = torch.randn(2, 24)
    for each in (whole, part, Packing([layer])):
        with torch.no_grad(), each.used():
            torch.testing.assert_close(layer.q_proj(x), F.linear(x, layer.q_proj.weight))


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
