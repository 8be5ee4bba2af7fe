"""Compiled rounds whose kernels are recorded once and launched all together: CUDA graphs.

A recording reads and writes where it did when it was made. Keys, values, weights and the text's tokens stay where they are. What
a round exchanges for other tensors has places of its own, some numbers a row and the states of recurrent layers:

    given  --copied-->  places  --launch-->  results        what caches hold goes back to its places within the launch

PyTorch would record by itself (`mode="reduce-overhead"`), but it would copy whatever is written in place, caches included.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cache import RaggedCache
from .loop import Roles
from .recurrent import Cell
from .state import DecodeState, Fresh, Text

Result = tuple[DecodeState, Tensor]
"""What a round returns: see `decode_round`."""
Record = Callable[[Callable[[], Result], torch.device], tuple[Result, Callable[[], None]]]
"""A function -> its result, and what launches it again, into the same result. Whether it runs meanwhile is open."""


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: what libraries keep for each stream is then kept once."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def on_cuda(function: Callable[[], Result], device: torch.device) -> tuple[Result, Callable[[], None]]:
    """As a CUDA graph with memory of its own; nothing runs before the launch. Raises RuntimeError for what cannot be recorded.

    Not `torch.cuda.graph`, which waits for the device and empties the allocator's cache: this happens in the midst of a text.
    """
    graph, now, apart = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device), _stream(device)
    apart.wait_stream(now)
    with torch.cuda.stream(apart):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = function()
        except BaseException:
            with suppress(RuntimeError):  # says no more than that something went wrong
                graph.capture_end()
            raise
        graph.capture_end()
    now.wait_stream(apart)
    return result, graph.replay


RECORDS: dict[str, Record] = {"cuda": on_cuda}
"""How kernels are recorded, by type of device. Elsewhere they are launched one by one."""


class Recorder:
    """Records until something cannot be recorded, and then says why."""

    def __init__(self, is_on: bool = True) -> None:
        self.is_on = is_on

    def captured(self, function: Callable[..., Result], target: nn.Module) -> Callable[..., Result]:
        """The round, recorded where that can be done: of a target that lies on one device."""
        device = next(target.parameters()).device
        is_recorded = self.is_on and device.type in RECORDS and all(each.device == device for each in target.parameters())
        return CapturedRound(function, self) if is_recorded else function

    def __call__(self, function: Callable[[], Result], device: torch.device) -> tuple[Result, Callable[[], None]] | None:
        try:
            return RECORDS[device.type](function, device)
        except RuntimeError as error:
            self.is_on = False
            reason = next(iter(str(error).strip().splitlines()), "no reason given")
            asked = f"compiled=True was asked for; the kernels of a round cannot be recorded on {device.type} ({reason})"
            warnings.warn(f"{asked} and are launched one by one.", stacklevel=7)
            return None


class _Recording(NamedTuple):
    """places: what is copied in ahead of a launch. left: what caches hold behind it. next, told: its result."""

    places: list[Tensor]
    left: list[Tensor]
    next: DecodeState
    told: Tensor
    launch: Callable[[], None]


class CapturedRound:
    """A compiled round that is recorded when it is called for the second time: in the first, its kernels are loaded.

    It is for one call of `generate`, one K, and one size of everything. It knows where caches lie and does not keep them alive.
    """

    def __init__(self, function: Callable[..., Result], recorder: Recorder) -> None:
        self._function, self._recorder = function, recorder
        self._is_loaded = False
        self._recording: _Recording | None = None

    def __call__(self, state: DecodeState, roles: Roles, num_speculative_tokens: int, *others: Any) -> Result:
        given = state, roles, num_speculative_tokens, *others
        if not self._is_loaded or not self._recorder.is_on:
            self._is_loaded = True
            return self._function(*given)
        cells = [cell for cache in roles.caches if isinstance(cache, RaggedCache) for cell in cache.moving()]
        read, held = _read(state, num_speculative_tokens), [where[name] for where, name in cells]
        if self._recording is None:
            self._recording = self._recorded(read, cells, *given)
        if self._recording is None:
            return self._function(*given)
        torch._foreach_copy_(self._recording.places, [*read, *held])
        self._recording.launch()
        _fill(cells, self._recording.left)
        written = [tensor.clone() for tensor in _read(self._recording.next, 1)]
        return _with(self._recording.next, written), self._recording.told.clone()

    def _recorded(self, read: list[Tensor], cells: list[Cell], state: DecodeState, *others: Any) -> _Recording | None:
        """A round that reads from places of its own, whatever they hold. None, and all as it was: it cannot be recorded."""
        held = [where[name] for where, name in cells]
        numbers, own, left = [each.clone() for each in read], [each.clone() for each in held], list[Tensor]()
        _fill(cells, own)

        def round_and_back() -> Result:
            result = self._function(_with(state, numbers), *others)
            found = [where[name] for where, name in cells]
            # behind a round of another K, windows and what goes by them are of other sizes than they will be
            left.extend(place.copy_(new) if place.shape == new.shape else new for place, new in zip(own, found, strict=True))
            return result

        recorded = self._recorder(round_and_back, state.done.device)
        if recorded is None:
            _fill(cells, held)
            return None
        (following, told), launch = recorded
        return _Recording([*numbers, *own], left, following, told, launch)


def _read(state: DecodeState, num_speculative_tokens: int) -> list[Tensor]:
    """What a round reads of a state and exchanges for something else. With K = 0 it does not read the fresh rows."""
    return [state.text.lengths, state.done, *(state.fresh if num_speculative_tokens else ())]


def _with(state: DecodeState, numbers: list[Tensor]) -> DecodeState:
    """The state with these in the place of what `_read` lists."""
    lengths, done, *fresh = numbers
    return DecodeState(Text(state.text.tokens, lengths, state.text.starts), Fresh(*fresh) if fresh else state.fresh, done)


def _fill(cells: list[Cell], tensors: list[Tensor]) -> None:
    for (where, name), tensor in zip(cells, tensors, strict=True):
        where[name] = tensor
