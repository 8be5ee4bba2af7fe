"""Weights packed for a CPU's matrix products, beside the model's own: they are read faster, above all for a few tokens at a time.

oneDNN computes `x @ weight.T` in blocks of its own; handed a plain weight it lays it out anew, or multiplies slowly, every time.
PyTorch packs ahead where it also freezes weights into a graph: a copy for every graph, blind to later changes, and nothing for
rounds that are not compiled. So the two operators behind that are called (`ways.py`): `_reorder_linear_weight` and
`_linear_pointwise`. They are PyTorch's own business, hence `can_pack`, which tries them out; where they fail, weights stay as
they are. Where the plain product is the faster one, or one in float32, that is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeGuard
from weakref import WeakKeyDictionary, finalize, ref

import torch
from torch import Tensor, library, nn

from .ways import Multiplier, Way, can_pack, multipliers, ways

SAMPLES = 64
"""Numbers of each weight that are compared with those of the time it was packed."""

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("in_proj_qkvz", "in_proj_ba"),
)
"""Names of Linears that models give one and the same input. Where one is given another, the text stays right; time is lost."""


class Weights(NamedTuple):
    """What a product multiplies by: for each name of the way, the weights of all siblings, ready to be multiplied by."""

    way: Way
    multipliers: dict[str, Multiplier]


_WEIGHTS: dict[int, Weights] = {}
"""By number: graphs cannot be given packed tensors, but numbers."""

_LIBRARY = library.Library("mtpdecode", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("packed_linear(Tensor x, int number, int num_out) -> Tensor")  # type: ignore[no-untyped-call]


def _packed_linear(x: Tensor, number: int, num_out: int) -> Tensor:
    weights = _WEIGHTS[number]
    return weights.multipliers[weights.way.of(x.numel() // x.shape[-1])](x)


_LIBRARY.impl("packed_linear", _packed_linear, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("packed_linear", lambda x, number, num_out: x.new_empty((*x.shape[:-1], num_out)), "Meta")  # type: ignore[no-untyped-call]


class Product:
    """The weights of one Linear, or of siblings that are given the same input, packed as one matrix and read in one go.

        q (16, 24)  k (8, 24)  v (8, 24)    packed (32, 24)        x (..., in)  ->  (..., 32), of which each takes its columns

    It is packed anew when a weight has changed: seen by the tensor's identity, its version, and a sample of its numbers, for
    `weight.data` hides its version.

    parts  by Linear: does what it does, from the packed weight        way  how it is packed, and for what
    """

    def __init__(self, linears: Sequence[nn.Linear], way: Way) -> None:
        self.way = way
        self.number, self._samples = max(_WEIGHTS, default=0) + 1, torch.empty(0)
        self._known: tuple[Any, ...] = ()
        self.renew(linears)
        ends = list(accumulate(linear.out_features for linear in linears))
        self.num_out, self.num_parts = ends[-1], len(ends)
        self.parts = [PackedLinear(self, at, slice(start, end)) for at, (start, end) in enumerate(pairwise([0, *ends]))]
        finalize(self, _WEIGHTS.pop, self.number, None)

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.mtpdecode.packed_linear(x, self.number, self.num_out)  # type: ignore[no-any-return]
        return _packed_linear(x, self.number, self.num_out)

    def renew(self, linears: Sequence[nn.Linear]) -> None:
        """Pack the weights if one is another than it was, has another version, or other numbers."""
        known = tuple(_identity(tensor) for linear in linears for tensor in (linear.weight, linear.bias))
        samples = torch.cat([_sample(linear.weight) for linear in linears])
        if not (known == self._known and torch.equal(samples, self._samples)):
            self._known, self._samples = known, samples
            siblings = [(linear.weight.detach(), None if linear.bias is None else linear.bias.detach()) for linear in linears]
            _WEIGHTS[self.number] = Weights(self.way, multipliers(siblings, self.way.names))


class PackedLinear:
    """Does what a Linear does, from its columns of a product, which the first of the siblings computes for all:

        q(x)  computes q k v, takes q        k(x)  takes k        v(x)  takes v, and the product is let go

    Each takes its columns once, and only where it is given the very tensor that was multiplied, unchanged; else it multiplies.
    """

    def __init__(self, product: Product, at: int, columns: slice) -> None:
        self.product, self.at, self.columns = product, at, columns

    def __call__(self, x: Tensor) -> Tensor:
        if self.product.num_parts == 1:
            return self.product(x)
        product, multiplied, version, output, waiting = _LAST.product
        if product is not self.product or multiplied is not x or version != _version(x) or self.at not in waiting:
            output, waiting = self.product(x), tuple(range(self.product.num_parts))
        waiting = tuple(at for at in waiting if at != self.at)
        _LAST.product = (self.product, x, _version(x), output, waiting) if waiting else NOTHING
        columns: Tensor = output[..., self.columns]
        return columns


def _version(x: Tensor) -> int:
    """How often it was written into; a graph is not asked, nor is a tensor that does not count."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


NOTHING: tuple[Any, ...] = None, None, 0, None, ()


class _Last:
    """The last product of siblings: whose, its input, who has yet to take columns of it. One tuple, so that a thread sees all or
    none of it."""

    product = NOTHING


_LAST = _Last()


def _identity(weight: Tensor | None) -> tuple[int, int, int]:
    if weight is None:
        return 0, 0, 0
    return id(weight), weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _sample(weight: Tensor) -> Tensor:
    """A few numbers from all over a weight, in no regular rows or columns."""
    flat = weight.detach().flatten()
    return flat[:: max(len(flat) // SAMPLES | 1, 1)].clone()


class Packing:
    """The packed Linears of some modules. Inside `used` they stand in for the modules' own forward; behind it nothing is changed.

    modules  what decodes; of these and all inside, plain Linears on the CPU are packed
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        inside = dict.fromkeys(module for root in modules for module in root.modules())
        groups = _grouped(inside)
        found = ways([[linear.weight for linear in linears] for linears in groups])
        self._products = [(linears, _product(linears, way)) for linears, way in zip(groups, found, strict=True)]
        self._pairs = [pair for linears, product in self._products for pair in zip(linears, product.parts, strict=True)]
        self._versioned: list[Tensor] = []
        self._versions = 0
        self.renew()

    @property
    def num_bytes(self) -> int:
        """What the packed copies hold in memory, about."""
        return sum(packed.product.way.itemsize(linear.weight.dtype) * linear.weight.numel() for linear, packed in self._pairs)

    def renew(self) -> None:
        """Pack anew what has changed."""
        for linears, product in self._products:
            product.renew(linears)
        self._versioned = [linear.weight for linear, _ in self._pairs if not linear.weight.is_inference()]
        self._versions = sum(weight._version for weight in self._versioned)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Not `setattr`, which takes a module's time: this is done every round. So are versions looked at, and nothing else."""
        if self._versions != sum(weight._version for weight in self._versioned):
            self.renew()
        for linear, packed in self._pairs:
            linear.__dict__["forward"] = packed
        try:
            yield
        finally:
            _LAST.product = NOTHING
            for linear, _ in self._pairs:
                linear.__dict__.pop("forward", None)


def _grouped(modules: Iterable[nn.Module]) -> list[tuple[nn.Linear, ...]]:
    """The packable Linears among some modules, siblings together."""
    modules = list(modules)
    groups = [group for module in modules for names in SIBLINGS for group in _siblings(dict(module.named_children()), names)]
    found: dict[nn.Linear, tuple[nn.Linear, ...]] = {}
    for linears in (*groups, *((module,) for module in modules if _is_packable(module))):
        if not any(linear in found for linear in linears):
            found |= dict.fromkeys(linears, linears)
    return list(dict.fromkeys(found.values()))


def _siblings(children: Mapping[str, nn.Module], names: Sequence[str]) -> Iterator[tuple[nn.Linear, ...]]:
    """Those children of these names that can be one product: as wide, of one dtype, all with a bias or none."""
    linears = [child for name in names if _is_packable(child := children.get(name))]
    kinds = {(linear.in_features, linear.weight.dtype, linear.bias is None) for linear in linears}
    if len(set(linears)) > 1 and len(kinds) == 1:
        yield tuple(dict.fromkeys(linears))


_KNOWN: WeakKeyDictionary[nn.Module, tuple[list[ref[nn.Linear]], Product]] = WeakKeyDictionary()
"""By the first Linear of a product, with all of them: so that the decoders of one model hold one copy."""


def _product(linears: Sequence[nn.Linear], way: Way) -> Product:
    known, product = _KNOWN.get(linears[0], ([], None))
    if product is None or [each() for each in known] != list(linears):
        product = Product(linears, way)
        _KNOWN[linears[0]] = [ref(linear) for linear in linears], product
    return product


def _is_packable(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """A Linear whose forward is its class's own: quantised ones are of another class, offloaded ones have another forward."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    return module.weight.device.type == "cpu" and can_pack(module.weight.dtype)
