"""What the parts of a round take: timers around calls where a round is not compiled, marks inside of the graph where it is.

The timers know nothing of what they time. Parts exclude each other: a part inside another one is taken out of the outer one, so
they add up to the whole. They tell the host's time; on a GPU, which runs behind the host, only whole rounds mean something.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, library
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mtpdecode
from mtpdecode import compiled, loop, verifier
from mtpdecode.cache import _RaggedLayer
from mtpdecode.sampling import Sampler
from mtpdecode.state import DecodeState, Window
from mtpdecode.stopping import Stopping

TARGET = "target forward"
ABSORB, STEPS, VOCABULARY = "head: absorb and first draft", "head: further drafts", "head: vocabulary product"
IN_GRAPH, REST, HOST = "ours in the graph", "bookkeeping; guards", "host: read tokens, loop"
OURS = ("processors", "acceptance", "stopping", "caches", IN_GRAPH, REST, HOST)
"""Parts outside of the forwards. Of a compiled round only the last three are known: the others are one in the graph, and what
is around it finds the graph and checks that it holds. The graph is a part of compiled rounds only."""
FORWARDS = (TARGET, ABSORB, STEPS, VOCABULARY)
MARKING = "the marks"
"""What marks take by themselves. No part of a round without them, so in no share; what it takes to call them is in the parts."""
PARTS = (*FORWARDS, *OURS, MARKING)
ATTENTION = {TARGET: "target: attention", ABSORB: "head: attention", STEPS: "head: attention"}
"""What `watching(..., attention=True)` takes out of the forwards."""


class Stopwatch:
    """Exclusive seconds by part, between `start` and `stop`; outside of these it stands still.

    start a   enter b   leave   stop        a | b | a
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def start(self, part: str) -> None:
        """From zero; whatever is no other part counts for this one."""
        self.seconds, self._open, self._since = defaultdict(float), [part], time.perf_counter()

    def stop(self) -> dict[str, float]:
        """-> seconds by part since `start`."""
        self._switch()
        self._open = []
        return dict(self.seconds)

    def enter(self, part: str) -> None:
        if self._open:
            self._switch()
            self._open.append(part)

    def leave(self) -> None:
        if self._open:
            self._switch()
            self._open.pop()

    def charge(self, part: str) -> None:
        """What passed since a part began or ended counts for this one, whatever is open."""
        if self._open:
            self._open.append(part)
            self._switch()
            self._open.pop()

    def part(self) -> str | None:
        """The innermost part that is open."""
        return self._open[-1] if self._open else None

    def around(self, name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed as the part that `name` gives for its arguments."""

        @wraps(function)  # transformers looks at the signature of `forward`
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(name(*args, **kwargs))
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return timed

    def _switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now


def rounds(decoder: mtpdecode.MTPDecoder, watch: Stopwatch, inputs: dict[str, Tensor], **options: Any) -> list[dict[str, float]]:
    """Decodes with `generate`; of every round what its parts took, from one reading of tokens to the next. The first round is
    left out, for the prompt is read with it."""
    found: list[dict[str, float]] = []
    update = mtpdecode.Metrics.update

    def told(metrics: mtpdecode.Metrics, *args: Any) -> None:
        found.append(watch.stop())
        update(metrics, *args)
        watch.start(HOST)

    watch.start(HOST)
    with patch.object(mtpdecode.Metrics, "update", told):
        decoder.generate(**inputs, **options)
    watch.stop()
    return found[1:]


# ── around calls ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def watching(decoder: mtpdecode.MTPDecoder, watch: Stopwatch, attention: bool = False) -> Iterator[None]:
    """Times what a round that is not compiled calls; nothing stays patched.

    attention  also apart: what attends to the keys, in target and head, and what writes them
    """
    named = [
        (decoder.target, "forward", TARGET),
        (decoder.head, "logits", VOCABULARY),
        (Sampler, "scores", "processors"),
        (loop, "judge", "acceptance"),
        (Stopping, "truncate", "stopping"),
        *((mtpdecode.RaggedCache, name, "caches") for name in ("window", "commit", "reserve")),
        (decoder, "step", REST),
    ]
    with ExitStack() as stack:
        for owner, attribute, part in named:
            timed = watch.around(lambda *_, part=part, **__: part, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, timed))
        timed = watch.around(_head_part, decoder.head.forward)
        stack.enter_context(patch.object(decoder.head, "forward", timed))
        if attention:
            stack.enter_context(_watching_attention(watch))
        yield


def _head_part(depth: int, embeds: Tensor, *_: Any) -> str:
    return ABSORB if embeds.shape[1] > 1 else STEPS


@contextmanager
def _watching_attention(watch: Stopwatch) -> Iterator[None]:
    """The functions that models attend with, where transformers hands them out, and the writing of keys and values."""
    table = type(ALL_ATTENTION_FUNCTIONS)
    plain = table.get_interface

    def get_interface(*args: Any) -> Callable[..., Any]:
        return watch.around(lambda *_, **__: ATTENTION.get(watch.part() or "", ATTENTION[TARGET]), plain(*args))

    written = watch.around(lambda *_, **__: "caches", _RaggedLayer.update)
    with patch.object(table, "get_interface", get_interface), patch.object(_RaggedLayer, "update", written):
        yield


# ── inside of a graph ──────────────────────────────────────────────────────────────────────────────────────────────────────

MARKS = (*FORWARDS, IN_GRAPH)
LEAVE = len(MARKS)
_MARKED = [Stopwatch()]
"""Who hears the marks; a graph can hold no stopwatch."""

_LIBRARY = library.Library("mtpdecode_benchmarks", "DEF")
_LIBRARY.define("mark(Tensor[] before, int part) -> Tensor")


def _mark(before: Sequence[Tensor], part: int) -> Tensor:
    """Tells the watch that a part begins, or ends. -> 0: what it is added to comes behind the mark, and `before` ahead of it."""
    if part == LEAVE:
        _MARKED[0].leave()
    else:
        _MARKED[0].enter(MARKS[part])
    zero = torch.zeros((), dtype=torch.long, device=before[0].device)
    _MARKED[0].charge(MARKING)
    return zero


_LIBRARY.impl("mark", _mark, "CompositeExplicitAutograd")
library.register_fake("mtpdecode_benchmarks::mark", lambda before, part: before[0].new_zeros((), dtype=torch.long))


def _marked(tensors: Sequence[Tensor], part: int, others: Sequence[Tensor] = ()) -> list[Tensor]:
    """The same tensors, there once the mark is passed."""
    zero = torch.ops.mtpdecode_benchmarks.mark([*tensors, *others], part)
    return [tensor + zero for tensor in tensors]


def _placed(window: Window, positions: Tensor) -> Window:
    return window._replace(positions=positions)


def _masks(window: Window) -> list[Tensor]:
    masks = window.mask.values() if isinstance(window.mask, dict) else [window.mask]
    return [mask for mask in masks if mask is not None]


_round, _forward = compiled.decode_round, verifier.forward
_head_forward, _head_logits = mtpdecode.MTPHead.forward, mtpdecode.MTPHead.logits


def _marked_round(state: DecodeState, *rest: Any) -> tuple[DecodeState, Tensor]:
    """Both ends of a graph: everything begins with the lengths, and ends with what is appended."""
    (lengths,) = _marked([state.text.lengths], MARKS.index(IN_GRAPH))
    state, told = _round(state._replace(text=state.text._replace(lengths=lengths)), *rest)
    return state, *_marked([told], LEAVE, [state.text.tokens, state.fresh.states])


def _marked_forward(model: Any, inputs: dict[str, Tensor], window: Window, *rest: Any) -> Any:
    *values, positions = _marked([*inputs.values(), window.positions], MARKS.index(TARGET), _masks(window))
    output = _forward(model, dict(zip(inputs, values, strict=True)), _placed(window, positions), *rest)
    return type(output)(*_marked(list(output), LEAVE))


def _marked_head_forward(self: Any, depth: int, embeds: Tensor, hidden: Tensor, window: Window) -> tuple[Tensor, ...]:
    part = MARKS.index(_head_part(depth, embeds))
    embeds, hidden, positions = _marked([embeds, hidden, window.positions], part, _masks(window))
    return tuple(_marked(_head_forward(self, depth, embeds, hidden, _placed(window, positions)), LEAVE))


def _marked_head_logits(self: Any, normed: Tensor, depth: int = 0) -> Tensor:
    (normed,) = _marked([normed], MARKS.index(VOCABULARY))
    return _marked([_head_logits(self, normed, depth)], LEAVE)[0]


@contextmanager
def marking(decoder: mtpdecode.MTPDecoder, watch: Stopwatch) -> Iterator[None]:
    """Times the forwards inside of compiled rounds. A graph that is made here has a mark where each begins and ends, and is
    otherwise as without: the compiler must keep the order, for what follows a mark needs what the mark returns.

    The patches are the same objects every time, so a graph is made once.
    """
    _MARKED[0] = watch
    with (
        patch.object(compiled, "decode_round", _marked_round),
        patch.object(verifier, "forward", _marked_forward),
        patch.object(mtpdecode.MTPHead, "forward", _marked_head_forward),
        patch.object(mtpdecode.MTPHead, "logits", _marked_head_logits),
        patch.object(decoder, "step", watch.around(lambda *_, **__: REST, decoder.step)),
    ):
        yield
