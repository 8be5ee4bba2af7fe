"""Whether a round waits: each time the host asks the device for a value, the device runs dry. A round must never ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

ASKING = {
    aten._local_scalar_dense.default: "reads a number (int(), bool(), .item())",
    aten.nonzero.default: "counts what is not zero (nonzero, a mask as index)",
    aten.masked_select.default: "counts what is not masked",
    aten._unique2.default: "counts what is unique",
    aten._unique.default: "counts what is unique",
    aten.unique_dim.default: "counts what is unique",
    aten.unique_consecutive.default: "counts what is unique",
    aten.repeat_interleave.Tensor: "counts repeats",
    aten.bincount.default: "counts bins",
    aten.equal.default: "compares on the host",
    aten.is_nonzero.default: "reads a bool",
}
"""What PyTorch computes by asking the device how large a result is, or what it is."""

INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
COPYING = (aten._to_copy.default, aten.copy_.default)


class WaitingError(RuntimeError):
    """A round waited for the device, or would have on a device of its own."""


MAKING = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
"""What carries the host's numbers to the device."""


class _NoNumbers(TorchFunctionMode):
    """Raises where a list of the host's goes to the device, or a whole tensor to the host."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in MAKING and not isinstance(args[-1], Tensor):
            raise WaitingError(f"{function.__name__}({args[-1]!r}) carries numbers to the device")
        if function is Tensor.tolist or function is Tensor.numpy:
            raise WaitingError(f"Tensor.{function.__name__} reads all numbers")
        if function in (Tensor.__getitem__, Tensor.__setitem__) and any(isinstance(each, list) for each in _indices(args[1])):
            raise WaitingError("a list as index carries numbers to the device")
        return function(*args, **(kwargs or {}))


def _indices(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


class _NoReading(TorchDispatchMode):
    """Raises where PyTorch asks the device for a value, and where tensors of two devices meet."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in ASKING:
            raise WaitingError(f"{function} {ASKING[function]}")
        if function in INDEXED and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
            raise WaitingError(f"{function} takes a mask as index")
        result = function(*args, **(kwargs or {}))
        shown = [args, kwargs, result] if function in COPYING else [args, kwargs]
        places = {str(each.device) for each in tree_leaves(shown) if isinstance(each, Tensor) and each.dim()}
        if len(places) > 1:
            raise WaitingError(f"{function} works on {' and '.join(sorted(places))}")
        return result


class NoWaiting(ExitStack):
    """Inside, what a GPU would be waited for raises WaitingError, on any device.

    On the CPU this sees what asks for a value. On "meta", a device that nobody can read and that cannot compute with the CPU's
    tensors, it sees all that a GPU would mind: copies to and from it, and tensors that were made on the CPU.
    """

    def __enter__(self) -> NoWaiting:
        super().__enter__()
        self.enter_context(_NoNumbers())
        self.enter_context(_NoReading())
        return self


@contextmanager
def _debugging() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def no_waiting(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, waiting for the device is an error: PyTorch's own check on a GPU, `NoWaiting` elsewhere."""
    return _debugging() if device.type == "cuda" else NoWaiting()


class WatchedStep:
    """A step of the loop, watched from the third round on: in the first ones caches are laid out, and graphs are made.

    num_watched  rounds that were watched, and did not wait
    """

    UNWATCHED = 2

    def __init__(self, step: Callable[..., Any], device: torch.device) -> None:
        self._step, self._device, self._num_rounds = step, device, 0

    @property
    def num_watched(self) -> int:
        return max(self._num_rounds - self.UNWATCHED, 0)

    def __call__(self, *args: Any) -> Any:
        with no_waiting(self._device) if self._num_rounds >= self.UNWATCHED else nullcontext():
            result = self._step(*args)
        self._num_rounds += 1
        return result
