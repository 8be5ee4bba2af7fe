"""Attention that chooses its keys: what an indexer chose at the first draft step, kept to by the later ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .errors import UnsupportedModelError
from .spec import MTPSpec
from .state import Window

CHOOSING = ("indexed_attention", "deepseek_sparse_attention", "qwen_sparse_attention")
"""Layer types with an indexer that chooses single keys; the others are what transformers 5.17 calls the first."""


def shared_indexers(blocks: Iterable[nn.Module], spec: MTPSpec, config: PreTrainedConfig) -> list[nn.Module]:
    """The indexers whose choice at the first draft step the later ones keep to; none where every step chooses its own.

    Raises UnsupportedModelError where the row asks for it and the blocks choose no keys.
    """
    said = spec.index_choice == "config" and getattr(config, "index_share_for_mtp_iteration", False)
    if not said and spec.index_choice != "first_step":
        return []
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= set(CHOOSING) or getattr(config, "index_kpool", None):  # GLM-5.3-Flash chooses pools of neighbours
        raise UnsupportedModelError(
            f"The later draft steps of a {spec.family} head were to keep to the keys that the first one chose; its blocks are of "
            f"type {', '.join(sorted(kinds))}, which chooses no single keys. Pass spec=spec.replace(index_choice='each_step')."
        )
    return [block.get_submodule("self_attn.indexer") for block in blocks]


class Choices:
    """The last choice that one of some indexers made: (B, T, k), the best k slots for each of T queries; or (B, 1, T, slots).

    The hooks live as long as somebody is `listening`; what is chosen behind `taken` is nobody's business.
    """

    def __init__(self, indexers: Iterable[nn.Module]) -> None:
        self._indexers = list(indexers)
        self.is_listening = not self._indexers
        self._last: Tensor | None = None
        self._is_wanted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In here choices are heard, once `wanted` was called."""
        handles, self.is_listening = [indexer.register_forward_hook(self._hear) for indexer in self._indexers], True
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.is_listening = not self._indexers

    def wanted(self) -> None:
        """From here on."""
        self._last, self._is_wanted = None, True

    def taken(self) -> Tensor | None:
        """The last one since `wanted`; None: nothing was chosen."""
        last, self._last, self._is_wanted = self._last, None, False
        return last

    def _hear(self, _: nn.Module, args: Any, choice: Tensor) -> None:
        if self._is_wanted:
            self._last = choice


def chosen(choice: Tensor, window: Window, counts: Tensor) -> Tensor:
    """choice (B, T, k), or (B, 1, T, slots) bool, made over a window -> (B, slots) bool: what the last real query of each row
    attends to.

        choice of the last query 3 0      it sees slots 0 1 2 3 of 6      kept 1 0 0 1 0 0

    A query that sees fewer than k slots "chooses" some that it cannot see as well; these are not kept.
    """
    assert isinstance(window.mask, Tensor)
    mask = _of_last(window.mask[:, 0], counts)
    seen = mask if mask.dtype == torch.bool else mask == 0
    if choice.dtype == torch.bool:
        return _of_last(choice[:, 0], counts) & seen
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
