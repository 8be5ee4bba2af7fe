"""How a few tokens are multiplied by a weight fastest on this CPU: found out by trying, for no rule knows all processors.

    plain   the weight as the model has it
    packed  laid out for oneDNN, in its own dtype
    wide    packed in float32: where a processor has no instructions for bfloat16, every product would widen the weight anew

All sum up in float32 and round to the weight's dtype; they differ in the order of the sum.
"""

from __future__ import annotations

import os
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
MOST_MEMORY, WIDE_BYTES = 0.25, 4
"""Copies in float32 take no more than this share of the machine's memory, at four bytes a weight."""

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


Seconds = Mapping[tuple[str, int], float]
"""(way, number of tokens) -> what products took."""

_FOUND: dict[Shape, Seconds] = {}


def ways(products: Sequence[Sequence[Tensor]]) -> list[Way]:
    """The way of each product, given by its weights (out, in), those of siblings together. Shapes that are not known yet are
    tried, a few seconds in all; where there is too little to be tried, weights are packed in their own dtype."""
    some = _some([weights for weights in products if _shape(weights) not in _FOUND])
    if sum(weight.nbytes for weights in some.values() for weight in weights) >= LEAST:
        _FOUND.update(_tried(some))
    may_widen = sum(weight.numel() for weights in products for weight in weights) * WIDE_BYTES < memory() * MOST_MEMORY
    return [
        chosen(seconds, weights[0].dtype, may_widen) if (seconds := _FOUND.get(_shape(weights))) else Way(weights[0].dtype)
        for weights in products
    ]


def chosen(seconds: Seconds, dtype: torch.dtype, may_widen: bool = True) -> Way:
    """Every number of tokens counts alike. Where plain is faster the model's own weight is read, so that one copy is packed."""

    def beside_packed(way: str) -> float:
        return sum(min(seconds[PLAIN, each], seconds[way, each]) / seconds[PACKED, each] for each in NUM_TOKENS)

    is_wide = may_widen and (WIDE, 1) in seconds and beside_packed(WIDE) < MARGIN * beside_packed(PACKED)
    way = WIDE if is_wide else PACKED
    faster = (each for each in NUM_TOKENS if seconds[PLAIN, each] < MARGIN * seconds[way, each])
    return Way(torch.float32 if is_wide else dtype, frozenset(faster))


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), USUAL_TOKENS)  # type: ignore[no-any-return]


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), in any dtype -> (..., out) in x's. weight: from `pack`; bias (out): in the weight's dtype."""
    if x.dtype != weight.dtype:
        return packed_product(x.to(weight.dtype), weight, bias).to(x.dtype)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def plain_product(x: Tensor, weights: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """x (..., in) -> (..., out), of the weights (out, in) and biases (out) of siblings one behind the other."""
    rows = x.reshape(-1, x.shape[-1])  # of rows with gaps, `F.linear` would copy the weight instead
    outputs = [F.linear(rows, weight, bias) for weight, bias in weights]
    product = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    return product.view(*x.shape[:-1], product.shape[-1])


def memory() -> int:
    """Bytes of this machine; 0: nobody knows."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


# ── trying ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _shape(weights: Sequence[Tensor]) -> Shape:
    return Shape(sum(map(len, weights)), weights[0].shape[1], weights[0].dtype, torch.get_num_threads())


Some = dict[tuple[Shape, int], tuple[Tensor, ...]]
"""(shape, number) -> the weights of siblings, or their first rows where they are large."""


def _some(products: Sequence[Sequence[Tensor]]) -> Some:
    """Of every shape one, and more in the model's order as long as they are few: what follows each other in a round, cold."""
    found: Some = {}
    num_bytes, seen = 0, set()
    for at, weights in enumerate(products):
        shape = _shape(weights)
        if shape not in seen or num_bytes < MOST:
            rows = max(MOST // 2 // (shape.num_in * shape.dtype.itemsize), 1)
            found[shape, at] = tuple(weight.detach()[:rows] for weight in weights)
            num_bytes += sum(weight.nbytes for weight in found[shape, at])
            seen.add(shape)
    return found


Product = Callable[[Tensor], Tensor]


def _products(weights: Sequence[Tensor]) -> dict[str, Product]:
    """By way. No wide one of what is float32 already."""
    own, whole = weights[0].dtype, torch.cat(list(weights))
    dtypes = {PACKED: own, WIDE: torch.float32} if own != torch.float32 else {PACKED: own}
    packed = {way: partial(packed_product, weight=pack(whole, dtype)) for way, dtype in dtypes.items()}
    return {PLAIN: partial(plain_product, weights=[(weight, None) for weight in weights]), **packed}


@torch.no_grad()
def _tried(some: Some) -> dict[Shape, Seconds]:
    """Shape -> what its products took: the fastest of some passes over all that is tried."""
    least: dict[Shape, dict[tuple[str, int], float]] = defaultdict(dict)
    products = {key: _products(weights) for key, weights in some.items()}
    for num_tokens in NUM_TOKENS:
        for _ in range(REPEATS):
            for way in (PLAIN, PACKED, WIDE):
                those = {key: each[way] for key, each in products.items() if way in each}
                for shape, seconds in _pass(those, num_tokens).items():
                    least[shape][way, num_tokens] = min(seconds, least[shape].get((way, num_tokens), seconds))
    return dict(least)


def _pass(products: Mapping[tuple[Shape, int], Product], num_tokens: int) -> dict[Shape, float]:
    """Shape -> seconds of its products, all of them one behind the other."""
    spent: dict[Shape, float] = defaultdict(float)
    inputs = {(shape.num_in, shape.dtype): torch.ones(num_tokens, shape.num_in, dtype=shape.dtype) for shape, _ in products}
    for (shape, _), product in products.items():
        x, begin = inputs[shape.num_in, shape.dtype], perf_counter()
        product(x)
        spent[shape] += perf_counter() - begin
    return spent
