"""Attention that tells distances by the cache's length, which all rows share, told in here by every row's own positions.

Inkling adds to each score a learned value for the distance between query and key, and lets scores grow with the position in long
texts. Its layers ask the cache where the window begins and get one number; ragged rows begin at different places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LEARNED = ("InklingAttention",)
"""Classes of attention whose distances are learned."""


class Places:
    """Where a window's queries stand, for each of the decoder layers that care.

    The hooks live as long as somebody is `listening`, for one window or many; `tell` says where the next one stands.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        found: list[Any] = [dict(block.named_children()).get("self_attn") for block in blocks]
        self._places = [_Place(attention) for attention in found if type(attention).__name__ in LEARNED]
        self.is_listening = not self._places  # where no layer cares there is nothing to hear

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In here the layers are told what was said last."""
        handles = [handle for place in self._places for handle in place.hooks()]
        self.is_listening = True
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.is_listening = not self._places

    def tell(self, positions: Tensor) -> None:
        """The queries of the window that comes stand at positions (B, T)."""
        for place in self._places:
            place.stand_at(positions)


class _Place:
    """Where the window's queries stand, for one attention."""

    def __init__(self, attention: Any) -> None:
        self._attention = attention

    def hooks(self) -> list[Any]:
        """Register them; -> handles."""
        bias = self._attention.rel_logits_proj
        before, behind = bias.register_forward_pre_hook(self.laid_out), bias.register_forward_hook(self.put_back)
        return [before, behind, self._attention.q_norm.register_forward_hook(self.grown)]

    def stand_at(self, positions: Tensor) -> None:
        self.positions, config = positions, self._attention.config
        self.growth: Tensor | None = None
        if config.log_scaling_n_floor is not None and not self._attention.is_sliding:
            count = (positions + 1).float() / config.log_scaling_n_floor
            self.growth = 1.0 + config.log_scaling_alpha * torch.log(count.clamp(min=1.0))

    def laid_out(self, _: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The queries (B, T, H, d) of all rows one behind the other, (1, B * T, H, d), each with its own position.

        The layer lets scores grow by the positions that it made; `grown` did that already, so it is to see the text's beginning.
        """
        states, shared, slots = args
        shared.fill_(-1)
        return states.flatten(0, 1)[None], self.positions.flatten(), slots

    def put_back(self, _: nn.Module, args: Any, bias: Tensor) -> Tensor:
        """(1, H, B * T, S) -> (B, H, T, S)"""
        bias = bias.reshape(bias.shape[1], *self.positions.shape, -1).transpose(0, 1)
        return bias if self.growth is None else (bias.float() * self.growth[:, None, :, None]).to(bias.dtype)

    def grown(self, _: nn.Module, args: Any, queries: Tensor) -> Tensor:
        """queries (B, T, H, D), as far into a long text as they stand."""
        return queries if self.growth is None else (queries.float() * self.growth[..., None, None]).to(queries.dtype)
