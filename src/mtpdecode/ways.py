"""How a few tokens are multiplied by a weight fastest on this CPU: found out by trying, for no rule knows all processors.

    plain   the weight as the model has it
    packed  laid out for oneDNN, in its own dtype
    wide    packed in float32: where a processor has no instructions for bfloat16, every product would widen the weight anew

All sum up in float32 and round to the weight's dtype; they differ in the order of the sum.
"""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

USUAL_TOKENS = 4
"""For so many tokens oneDNN chooses the blocks: a window's. More and fewer go through the same blocks."""
NUM_TOKENS = (1, 2, 3, 4, 6, 8, 16, 32)
"""What is tried; a number in between goes as the next smaller one, a larger one as the last."""
REPEATS = 3
MARGIN = 0.9
"""What is not faster by a tenth is not preferred: chance shall not choose, and a second process shall choose alike."""
LEAST, MOST = 2**24, 2**26
"""Bytes of weights. Fewer are not tried: they stay in the processor's caches. No more are tried, save one of each shape."""

PLAIN, PACKED, WIDE = "plain", "packed", "wide"


class Way(NamedTuple):
    """How products of one shape are computed.

    dtype      of the packed copy: the weight's own or, wide, float32
    plain_for  of NUM_TOKENS, those for which the weight as it is, is faster than its packed copy
    """

    dtype: torch.dtype
    plain_for: frozenset[int] = frozenset()

    def is_plain(self, num_tokens: int) -> bool:
        return NUM_TOKENS[max(bisect(NUM_TOKENS, num_tokens) - 1, 0)] in self.plain_for


class Shape(NamedTuple):
    """What may have another fastest way."""

    num_out: int
    num_in: int
    dtype: torch.dtype
    num_threads: int


_FOUND: dict[Shape, Way] = {}


def ways(products: Sequence[Sequence[Tensor]]) -> list[Way]:
    """The way of each product, given by its weights (out, in), those of siblings together. Shapes that are not known yet are
    tried, a second or two in all; where there is too little to be tried, weights are packed in their own dtype."""
    some = _some([weights for weights in products if _shape(weights) not in _FOUND])
    if sum(weight.nbytes for weight in some.values()) >= LEAST:
        _FOUND.update({shape: chosen(shape.dtype, seconds) for shape, seconds in _tried(some).items()})
    return [_FOUND.get(_shape(weights), Way(weights[0].dtype)) for weights in products]


def chosen(dtype: torch.dtype, seconds: Mapping[tuple[str, int], float]) -> Way:
    """(way, number of tokens) -> what products took. Every number of tokens counts alike; what is plain where that is faster is
    read from the model's own weight, so one copy is packed."""

    def beside_packed(way: str) -> float:
        return sum(min(seconds[PLAIN, each], seconds[way, each]) / seconds[PACKED, each] for each in NUM_TOKENS)

    is_wide = (WIDE, 1) in seconds and beside_packed(WIDE) < MARGIN * beside_packed(PACKED)
    way = WIDE if is_wide else PACKED
    faster = (each for each in NUM_TOKENS if seconds[PLAIN, each] < MARGIN * seconds[way, each])
    return Way(torch.float32 if is_wide else dtype, frozenset(faster))


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), USUAL_TOKENS)  # type: ignore[no-any-return]


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in), in any dtype -> (..., out) in x's. weight: from `pack`; bias (out): in the weight's dtype."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")
    return product.to(x.dtype)


# ── trying ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _shape(weights: Sequence[Tensor]) -> Shape:
    return Shape(sum(map(len, weights)), weights[0].shape[1], weights[0].dtype, torch.get_num_threads())


Some = dict[tuple[Shape, int], Tensor]
"""(shape, number) -> a weight of that shape, or its first rows where it is large."""


def _some(products: Sequence[Sequence[Tensor]]) -> Some:
    """Of every shape one, and more in the model's order as long as they are few: what follows each other in a round, cold."""
    found: Some = {}
    num_bytes, seen = 0, set()
    for at, weights in enumerate(products):
        shape = _shape(weights)
        if shape not in seen or num_bytes < MOST:
            rows = max(MOST // 2 // (weights[0].nbytes // len(weights[0])), 1)
            found[shape, at] = torch.cat([weight.detach()[:rows] for weight in weights])[:rows]
            num_bytes += found[shape, at].nbytes
            seen.add(shape)
    return found


@torch.no_grad()
def _tried(some: Some) -> dict[Shape, dict[tuple[str, int], float]]:
    """Shape -> (way, number of tokens) -> seconds of its products: the fastest of some passes over all that is tried."""
    packed: dict[str, Some] = {
        PLAIN: some,
        PACKED: {key: pack(weight, weight.dtype) for key, weight in some.items()},
        WIDE: {key: pack(weight, torch.float32) for key, weight in some.items() if weight.dtype != torch.float32},
    }
    least: dict[Shape, dict[tuple[str, int], float]] = defaultdict(dict)
    for num_tokens in NUM_TOKENS:
        for _ in range(REPEATS):
            for way, weights in packed.items():
                for shape, seconds in _pass(way, weights, num_tokens).items():
                    least[shape][way, num_tokens] = min(seconds, least[shape].get((way, num_tokens), seconds))
    return least


def _pass(way: str, weights: Some, num_tokens: int) -> dict[Shape, float]:
    """Shape -> seconds of its products, all products of one way one behind the other."""
    spent: dict[Shape, float] = defaultdict(float)
    inputs = {(shape.num_in, shape.dtype): torch.ones(num_tokens, shape.num_in, dtype=shape.dtype) for shape, _ in weights}
    for (shape, _), weight in weights.items():
        x, begin = inputs[shape.num_in, shape.dtype], perf_counter()
        F.linear(x, weight) if way == PLAIN else packed_product(x, weight, None)
        spent[shape] += perf_counter() - begin
    return spent
