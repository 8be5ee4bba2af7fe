"""Where two decodings of one prompt part, and whether rounding alone can have done it. Knows no decoder: only token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .target import cache_keyword


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first place where a text differs from the one expected.

    position   counted from the first new token
    expected   the token id that was expected there, None where that text had ended
    actual     the token id that was found there, None where this text had ended
    margin     how far the lower of the two stands below the target's best logit there; nan where a text had ended
    noise      how much the same logits change, at most, when the target computes them with a cache and without
    """

    position: int
    expected: int | None
    actual: int | None
    margin: float
    noise: float

    @property
    def is_tie(self) -> bool:
        """Rounding decides: each of two logits may be off by `noise`, so a margin of up to twice that means nothing."""
        return self.margin <= 2 * self.noise

    def describe(self, spell: Callable[[int], str]) -> str:
        """In words, with tokens as `spell` writes them."""
        actual, expected = ("the end" if token is None else spell(token) for token in (self.actual, self.expected))
        if self.expected is None or self.actual is None:
            return f"new token {self.position + 1}: {actual} instead of {expected}"
        verdict = "a tie that rounding decides" if self.is_tie else "NOT a tie"
        margin = f"top-2 margin {self.margin:.2g}, rounding {self.noise:.2g}"
        return f"new token {self.position + 1}: {actual} instead of {expected}; {margin}: {verdict}"


def first_divergence(
    target: PreTrainedModel, prompt: Sequence[int], expected: Sequence[int], actual: Sequence[int]
) -> Divergence | None:
    """Compare the new tokens of two greedy texts of one prompt; where they part, score that place again.

    Returns None where they are equal.
    """
    pairs = zip_longest(expected, actual)
    position = next((at for at, (left, right) in enumerate(pairs) if left != right), None)
    if position is None:
        return None
    left, right = (text[position] if position < len(text) else None for text in (expected, actual))
    if left is None or right is None:
        return Divergence(position, left, right, float("nan"), float("nan"))
    ids = torch.tensor([[*prompt, *expected[:position]]], device=target.device)
    logits, noise = _next_logits(target, ids)
    margin = logits.max() - torch.minimum(logits[left], logits[right])
    return Divergence(position, left, right, float(margin), noise)


@torch.inference_mode()
def _next_logits(target: PreTrainedModel, ids: Tensor) -> tuple[Tensor, float]:
    """ids (1, n) -> the logits (V,) float32 of what follows, and how much they change when the last token comes by itself."""
    whole = target(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    if ids.shape[1] == 1:
        return whole, 0.0
    cache = {cache_keyword(target.forward): DynamicCache(config=target.config.get_text_config(decoder=True))}
    target(ids[:, :-1], **cache, use_cache=True, logits_to_keep=1)
    stepped = target(ids[:, -1:], **cache, use_cache=True).logits[0, -1].float()
    return whole, float((whole - stepped).abs().max())
