"""A target whose code came with its checkpoint is tried out before it is trusted: it is exact, or it is refused."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .cache import CacheLayout, RaggedCache
from .errors import UnsupportedModelError
from .target import evaluating, forward, text_config, training_modules

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""How far logits may be off, in parts of the largest one; for coarser numbers, 0.1."""


def rehearse(target: PreTrainedModel, layout: CacheLayout) -> None:
    """Read six tokens in two ragged rows, with two drafted ones in between that are not kept, and once more in one pass.

        row 0   a b c d | e f        window of four, all kept; then two more
        row 1   f e x y | d c        two of the four kept; then what x and y should have been

    Raises UnsupportedModelError where the logits differ, or where the model's code takes none of it.
    """
    name = type(target).__name__
    try:
        with torch.no_grad(), evaluating(training_modules(target)):
            error = _error(target, layout)
    except Exception as trouble:  # whatever code of others may raise
        raise UnsupportedModelError(_refusal(name, f"it raises {type(trouble).__name__}: {trouble}")) from trouble
    if not error <= TOLERANCE.get(target.dtype, 0.1):
        raise UnsupportedModelError(_refusal(name, f"the logits of a rehearsal are off by {error:.1e} of the largest"))


def _error(target: PreTrainedModel, layout: CacheLayout) -> float:
    ids = (torch.arange(6, device=target.device) + 3) % text_config(target).vocab_size
    rows = torch.stack([ids, ids.flip(0)])
    wrong, kept = rows[:, :4].clone(), torch.tensor([4, 2], device=target.device)
    wrong[1, 2:] = ids[:2]
    cache = RaggedCache(layout, text_config(target).num_hidden_layers, 2, target.device)
    cache.reserve(6)
    forward(target, {"input_ids": wrong}, cache.window(4), 4, "post_norm")
    cache.commit(kept)
    slots = kept[:, None] + torch.arange(2, device=target.device)
    found = forward(target, {"input_ids": rows.gather(1, slots)}, cache.window(2), 2, "post_norm").logits
    return _largest_gap(found, _at(target(rows, use_cache=False).logits, slots))


def _at(logits: Tensor, slots: Tensor) -> Tensor:
    """logits (B, n, V), slots (B, T) -> (B, T, V)"""
    return logits.gather(1, slots[..., None].expand(-1, -1, logits.shape[-1]))


def _largest_gap(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def _refusal(name: str, found: str) -> str:
    return (
        f"{name} was to be decoded speculatively, with the code that came with its checkpoint; {found}: that code does not take "
        "the masks, positions and caches that transformers' own models take. Call model.generate() without mtpdecode."
    )
