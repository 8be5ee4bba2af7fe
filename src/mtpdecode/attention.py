"""Attention over a cache without copying it: heads that share keys share a product with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "sdpa"
UNUSUAL = ("dropout", "position_bias", "cache", "softcap", "output_attentions")
"""What transformers' "sdpa" may be asked for besides, and folding does not know."""


def folded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers' "sdpa" does, but where g heads share one key, these g heads become rows of one head:

        query (B, H, T, D)  ->  (B, H / g, g * T, D)        mask (B, 1, T, S)  ->  (B, 1, g * T, S)

    transformers copies keys and values g times over instead, in every layer and round. -> (B, T, H, D), None
    """
    is_unusual = any(isinstance(kwargs.get(name), Tensor) or kwargs.get(name) for name in UNUSUAL)
    if attention_mask is None or attention_mask.shape[1] != 1 or is_unusual:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows, heads, num_tokens, width = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(rows, key.shape[1], groups * num_tokens, width)
    mask = _MASKS.folded(attention_mask, groups, query)
    output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=kwargs.get("scaling"))
    return output.reshape(rows, heads, num_tokens, -1).transpose(1, 2).contiguous(), None


class _Masks:
    """The mask that was folded last: most layers of a forward pass are given the same one."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._last: tuple[Tensor | None, Any, Tensor] = None, None, torch.empty(0)

    def folded(self, mask: Tensor, groups: int, query: Tensor) -> Tensor:
        """mask (B, 1, T, S) -> (B, 1, groups * T, S), on a CPU as numbers to be added: torch makes them in every layer anew."""
        if torch.compiler.is_compiling():  # a graph makes it where it is used
            return mask.repeat(1, 1, groups, 1)
        last, kind = self._last, (groups, query.dtype, query.device)
        if last[0] is not mask or last[1] != kind:
            self._last = last = mask, kind, _additive(mask, query).repeat(1, 1, groups, 1)
        return last[2]


_MASKS = _Masks()


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    if mask.dtype != torch.bool or query.device.type != "cpu":
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))


@contextmanager
def folding() -> Iterator[None]:
    """In here layers whose attention is transformers' own "sdpa" find `folded_attention` under that name."""
    usual = AttentionInterface._global_mapping[NAME]
    if usual is not sdpa_attention_forward:  # it is the user's, or folds already
        yield
        return
    AttentionInterface.register(NAME, folded_attention)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, usual)
        _MASKS.forget()
