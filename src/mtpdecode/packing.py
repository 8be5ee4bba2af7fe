"""Weights packed for a CPU's matrix products, beside the model's own: they are read faster, above all for a few tokens at a time.

oneDNN computes `x @ weight.T` in blocks of its own; handed a plain weight it lays it out anew, or multiplies slowly, every time.
PyTorch packs ahead where it also freezes weights into a graph: a copy for every graph, blind to later changes, and nothing for
rounds that are not compiled. So the two operators behind that are called here: `_reorder_linear_weight` and `_linear_pointwise`.
They are PyTorch's own business, hence `can_pack`, which tries them out; where they fail, weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary, finalize

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

USUAL_TOKENS = 4
"""For so many tokens oneDNN chooses the blocks: a window's. More and fewer go through the same blocks."""
SAMPLES = 64
"""Numbers of each weight that are compared with those of the time it was packed."""

_WEIGHTS: dict[int, tuple[Tensor, Tensor | None]] = {}
"""Packed weights and their biases by number: graphs cannot be given packed tensors, but numbers."""

_LIBRARY = library.Library("mtpdecode", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("packed_linear(Tensor x, int number, int num_out) -> Tensor")  # type: ignore[no-untyped-call]


def _packed_linear(x: Tensor, number: int, num_out: int) -> Tensor:
    weight, bias = _WEIGHTS[number]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


_LIBRARY.impl("packed_linear", _packed_linear, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("packed_linear", lambda x, number, num_out: x.new_empty((*x.shape[:-1], num_out)), "Meta")  # type: ignore[no-untyped-call]


class PackedLinear:
    """Does what a Linear does, from a packed copy of its weight, which is made anew when the weight has changed.

        x (..., in)  ->  (..., out)

    A change is seen by the tensor's identity, its version, and a sample of its numbers, for `weight.data` hides its version.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.num_out, self.number = linear.out_features, max(_WEIGHTS, default=0) + 1
        self._known: tuple[Any, ...] = ()
        self._sample = torch.empty(0)
        self.renew(linear)
        finalize(self, _WEIGHTS.pop, self.number, None)

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.mtpdecode.packed_linear(x, self.number, self.num_out)  # type: ignore[no-any-return]
        return _packed_linear(x, self.number, self.num_out)

    def renew(self, linear: nn.Linear) -> None:
        """Pack the weight if it is another than it was, has another version, or other numbers."""
        known, sample = (_identity(linear.weight), _identity(linear.bias)), _sample(linear.weight)
        if not (known == self._known and torch.equal(sample, self._sample)):
            self._known, self._sample = known, sample
            bias = None if linear.bias is None else linear.bias.detach()
            _WEIGHTS[self.number] = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), USUAL_TOKENS), bias


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
        self._pairs = [(linear, _packed(linear)) for linear in inside if _is_packable(linear)]
        self._versioned: list[Tensor] = []
        self._versions = 0
        self.renew()

    @property
    def num_bytes(self) -> int:
        """What the packed copies hold in memory, about."""
        return sum(linear.weight.nbytes for linear, _ in self._pairs)

    def renew(self) -> None:
        """Pack anew what has changed."""
        for linear, packed in self._pairs:
            packed.renew(linear)
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
            for linear, _ in self._pairs:
                linear.__dict__.pop("forward", None)


_KNOWN: WeakKeyDictionary[nn.Module, PackedLinear] = WeakKeyDictionary()
"""So that the decoders of one model hold one copy."""


def _packed(linear: nn.Linear) -> PackedLinear:
    if linear not in _KNOWN:
        _KNOWN[linear] = PackedLinear(linear)
    return _KNOWN[linear]


def _is_packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A Linear whose forward is its class's own: quantised ones are of another class, offloaded ones have another forward."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    return module.weight.device.type == "cpu" and can_pack(module.weight.dtype)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch packs such weights, and multiplies with them rightly."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    x, weight = torch.linspace(-1, 1, 3 * 16).view(3, 16).to(dtype), torch.linspace(-1, 1, 32 * 16).view(32, 16).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, USUAL_TOKENS)
        product = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(product.float(), F.linear(x, weight).float(), rtol=2e-2, atol=1e-2)
