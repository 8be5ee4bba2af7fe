"""Folded attention is transformers' own, without copies; and nobody finds it there when a round is over."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mtpdecode.attention import NAME, folded_attention, folding
from tests import tiny

B, T, S, D = 2, 3, 7, 8


class Layer(torch.nn.Module):
    """What a layer tells its attention function."""

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def made(heads, kept, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(B, number, size, D, generator=generator, dtype=dtype) for number, size in ((heads, T), (kept, S), (kept, S))
    )
    seen = torch.arange(S) <= torch.tensor([[2, 3, 4], [4, 5, 6]])[..., None]
    return query, key, value, seen[:, None]


@pytest.mark.parametrize(("heads", "kept"), [(6, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_says_what_transformers_says(heads, kept, additive, scaling):
    query, key, value, mask = made(heads, kept)
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    expected, _ = sdpa_attention_forward(Layer(heads // kept), query, key, value, mask, scaling=scaling)
    found, _ = folded_attention(Layer(heads // kept), query, key, value, mask, scaling=scaling)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_keys_are_not_copied():
    """Of all tensors made on the way, none is as large as keys times heads."""
    query, key, value, mask = made(6, 2)
    large = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            large.extend(func for each in torch.utils._pytree.tree_leaves(output) if _size(each) >= B * 6 * S * D)
            return output

    def _size(each):
        return each.untyped_storage().nbytes() // each.element_size() if isinstance(each, torch.Tensor) else 0

    with Sizes():
        folded_attention(Layer(3), query, key, value, mask)
    assert not large
    with Sizes():
        sdpa_attention_forward(Layer(3), query, key, value, mask)
    assert large, "the test sees copies where there are some"


def test_what_it_does_not_know_goes_to_transformers(monkeypatch):
    given = []
    monkeypatch.setattr("mtpdecode.attention.sdpa_attention_forward", lambda *args, **kwargs: given.append(kwargs))
    folded_attention(Layer(3), *made(6, 2), dropout=0.5)
    assert given == [{"dropout": 0.5}]


def registered():
    return AttentionInterface._global_mapping[NAME]


def test_is_there_inside_and_gone_behind():
    with folding():
        assert registered() is folded_attention
        with folding():
            assert registered() is folded_attention
        assert registered() is folded_attention
    assert registered() is sdpa_attention_forward
    with pytest.raises(ZeroDivisionError), folding():
        raise ZeroDivisionError
    assert registered() is sdpa_attention_forward


def test_an_attention_of_the_users_own_stays():
    def own(*args, **kwargs):
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register(NAME, own)
    try:
        with folding():
            assert registered() is own
    finally:
        AttentionInterface.register(NAME, sdpa_attention_forward)


def test_rounds_use_it(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0])
        return folded_attention(*args, **kwargs)

    monkeypatch.setattr("mtpdecode.attention.folded_attention", counted)
    tiny.decoder("llama").generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=6, do_sample=False)
    assert calls
    assert registered() is sdpa_attention_forward
