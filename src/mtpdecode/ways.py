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
from functools import cache, partial
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
"""Copies in float32, of four bytes a weight, are made where they take less than this share of the machine's memory."""

EVERY = PLAIN, PACKED, WIDE = "plain", "packed", "wide"


class Way(NamedTuple):
    """How products of one shape are computed: for each of NUM_TOKENS a name."""

    names: tuple[str, ...] = (PACKED,) * len(NUM_TOKENS)

    def of(self, num_tokens: int) -> str:
        return self.names[max(bisect(NUM_TOKENS, num_tokens) - 1, 0)]

    def itemsize(self, dtype: torch.dtype) -> int:
        """Bytes that the copies of a weight of this dtype take."""
        return sum(each.itemsize for name, each in packed_dtypes(dtype).items() if name in self.names)


def packed_dtypes(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Of packed copies, by way; what is float32 already has no wide one, nor has any where float32 is not packed."""
    is_widened = dtype != torch.float32 and can_pack(torch.float32)
    return {PACKED: dtype, WIDE: torch.float32} if is_widened else {PACKED: dtype}


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
    return [chosen(seconds, may_widen) if (seconds := _FOUND.get(_shape(weights))) else Way() for weights in products]


def chosen(seconds: Seconds, may_widen: bool = True) -> Way:
    """For each number of tokens the fastest; another one than packed where it is faster by a tenth. Wide ones, which take a copy
    of their own, where that is so of all numbers of tokens together, each of which counts alike."""
    known = [way for way in EVERY if (way, 1) in seconds and (way != WIDE or may_widen)]
    if _beside_packed(seconds, known) >= MARGIN * _beside_packed(seconds, [PLAIN, PACKED]):
        known = [PLAIN, PACKED]
    fastest = [min(known, key=lambda way: seconds[way, each]) for each in NUM_TOKENS]
    pairs = zip(fastest, NUM_TOKENS, strict=True)
    return Way(tuple(way if seconds[way, each] < MARGIN * seconds[PACKED, each] else PACKED for way, each in pairs))


def _beside_packed(seconds: Seconds, known: Sequence[str]) -> float:
    return sum(min(seconds[way, each] for way in known) / seconds[PACKED, each] for each in NUM_TOKENS)


Multiplier = Callable[[Tensor], Tensor]
"""x (..., in) -> (..., out)"""


def multipliers(siblings: Sequence[tuple[Tensor, Tensor | None]], names: Sequence[str]) -> dict[str, Multiplier]:
    """Of the weights (out, in) and biases (out) of siblings, by way; a copy is made for each but the plain one."""
    whole = torch.cat([weight for weight, _ in siblings]) if len(siblings) > 1 else siblings[0][0]
    biases = [bias for _, bias in siblings if bias is not None]
    found: dict[str, Multiplier] = {PLAIN: partial(plain_product, siblings=siblings)} if PLAIN in names else {}
    for name, dtype in packed_dtypes(whole.dtype).items():
        if name in names:
            bias = torch.cat(biases).to(dtype) if biases else None
            found[name] = partial(packed_product, weight=pack(whole, dtype), bias=bias)
    return found


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), USUAL_TOKENS)  # type: ignore[no-any-return]


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), in any dtype -> (..., out) in x's. weight: from `pack`; bias (out): in the weight's dtype."""
    if x.dtype != weight.dtype:
        return packed_product(x.to(weight.dtype), weight, bias).to(x.dtype)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def plain_product(x: Tensor, siblings: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """x (..., in) -> (..., out): what the weights and biases of siblings give, side by side."""
    rows = x.reshape(-1, x.shape[-1])  # of rows with gaps, `F.linear` would copy the weight instead
    outputs = [F.linear(rows, weight, bias) for weight, bias in siblings]
    product = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    return product.view(*x.shape[:-1], product.shape[-1])


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch packs such weights, and multiplies with them rightly."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    x, weight = torch.linspace(-1, 1, 3 * 16).view(3, 16).to(dtype), torch.linspace(-1, 1, 32 * 16).view(32, 16).to(dtype)
    try:
        product = packed_product(x, pack(weight, dtype))
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(product.float(), F.linear(x, weight).float(), rtol=2e-2, atol=1e-2)


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


@torch.no_grad()
def _tried(some: Some) -> dict[Shape, Seconds]:
    """Shape -> what its products took: the fastest of some passes over all that is tried."""
    least: dict[Shape, dict[tuple[str, int], float]] = defaultdict(dict)
    tried = {key: multipliers([(weight, None) for weight in weights], EVERY) for key, weights in some.items()}
    for num_tokens in NUM_TOKENS:
        for _ in range(REPEATS):
            for way in EVERY:
                those = {key: each[way] for key, each in tried.items() if way in each}
                for shape, seconds in _pass(those, num_tokens).items():
                    least[shape][way, num_tokens] = min(seconds, least[shape].get((way, num_tokens), seconds))
    return dict(least)


def _pass(those: Mapping[tuple[Shape, int], Multiplier], num_tokens: int) -> dict[Shape, float]:
    """Shape -> seconds of its products, all of them one behind the other."""
    spent: dict[Shape, float] = defaultdict(float)
    inputs = {(shape.num_in, shape.dtype): torch.ones(num_tokens, shape.num_in, dtype=shape.dtype) for shape, _ in those}
    for (shape, _), multiply in those.items():
        x, begin = inputs[shape.num_in, shape.dtype], perf_counter()
        multiply(x)
        spent[shape] += perf_counter() - begin
    return spent
