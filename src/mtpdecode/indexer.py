"""Attention that chooses its keys: what an indexer chose at the first draft step, kept to by the later ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .state import Window


@contextmanager
def recorded(indexers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside, every choice that one of these makes: (B, T, k) slots, the best k for each of T queries."""
    choices: list[Tensor] = []
    handles = [indexer.register_forward_hook(lambda _, args, choice: choices.append(choice)) for indexer in indexers]
    try:
        yield choices
    finally:
        for handle in handles:
            handle.remove()


def chosen(choice: Tensor, window: Window, counts: Tensor) -> Tensor:
    """choice (B, T, k) made over a window -> (B, slots) bool: what the last real query of each row, number counts - 1, attends to.

    A query with fewer than k slots behind it "chooses" some that it cannot see; these are not kept.
    """
    assert isinstance(window.mask, Tensor)
    mask = _of_last(window.mask[:, 0], counts)
    seen = mask if mask.dtype == torch.bool else mask == 0
    return torch.zeros_like(seen).scatter(-1, _of_last(choice, counts).long(), True) & seen


def narrowed(window: Window, kept: Tensor) -> Window:
    """The window, in which every query sees the kept slots (B, slots) alone: whatever its indexer scores, it chooses these."""
    assert isinstance(window.mask, Tensor)
    mask = window.mask
    outside = ~F.pad(kept, (0, mask.shape[-1] - kept.shape[-1]))[:, None, None]
    lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return window._replace(mask=mask.masked_fill(outside, lowest))


def _of_last(rows: Tensor, counts: Tensor) -> Tensor:
    """rows (B, T, n), counts (B,) -> (B, n), that of the last real query; in a row that has none, of the first."""
    place = (counts.clamp(min=1) - 1)[:, None, None].expand(-1, 1, rows.shape[-1])
    return rows.gather(1, place)[:, 0]
