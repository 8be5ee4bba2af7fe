"""Rounds as compiled graphs: drafting, scoring, acceptance, stopping and commit in one, for every batch size and K."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .acceptance import ACCEPTANCE
from .cache import RaggedCache
from .captured import Recorder, Result
from .loop import Clock, Roles, decode_round
from .recurrent import RecurrentLayer
from .state import DecodeState, Noise
from .verifier import Verifier


class CompiledRound:
    """`decode_round`, compiled whole; a model that cannot be traced whole is compiled in pieces, with a warning that says why.

    A graph holds for one batch size, one K and one kind of sampling. Lengths are left open, so that a text may grow. Our hooks
    are there before a round begins, and become part of its graph. So do hooks of the user's, and others are another graph. What
    asks the host in the midst of a round, a recurrence how many tokens were kept, or a model how often to loop, runs as without
    compilation, with a warning.

    backend      of `torch.compile`
    is_captured  on a GPU, record the kernels of a round and launch them together (`captured.py`)
    """

    def __init__(self, backend: str = "inductor", is_captured: bool = True) -> None:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
        self._backend, self._is_captured = backend, is_captured
        self._is_whole, self._has_warned = True, False
        self._verifier: Callable[[], Verifier | None] = lambda: None
        self._asking = self._untraceable = self._hooks = ""

    def __call__(
        self, state: DecodeState, roles: Roles, num_speculative_tokens: int, noise: Noise, clock: Clock
    ) -> tuple[DecodeState, Tensor]:
        if self._verifier() is not roles.verifier:  # a new call; a walk through the model is too long for every round
            self._verifier, self._asking, self._hooks = ref(roles.verifier), _asking(roles), _hooks(roles.verifier.target)
        if why := self._asking or self._untraceable:
            self._warn(roles, why, "runs as without compiled=True.")
            return decode_round(state, roles, num_speculative_tokens, noise, clock)
        try:
            result = self._kind(state, roles, num_speculative_tokens)(state, roles, num_speculative_tokens, noise, self._hooks)
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
            if not self._is_whole:
                raise
            if isinstance(error, torch._dynamo.exc.Unsupported):
                self._warn(roles, _reason(error), "is compiled in pieces, which is slower than one graph.")
                self._is_whole = False
            else:  # in pieces it would come again, in the midst of a round
                self._untraceable = _reason(error)
            return self(state, roles, num_speculative_tokens, noise, clock)
        clock.lap("round")
        return result

    @property
    def _ways(self) -> tuple[str, bool, bool]:
        return self._backend, self._is_captured, self._is_whole

    def _kind(self, state: DecodeState, roles: Roles, num_speculative_tokens: int) -> _Kind:
        """All decoders of a model share their graphs."""
        num_rows, num_fresh = state.fresh.states.shape[:2]
        shape = num_rows, num_speculative_tokens, num_fresh if num_speculative_tokens else 0
        key = shape, roles.sampler.do_sample, roles.sampler.is_plain, roles.rule, *self._ways, self._hooks
        kinds = _KINDS.setdefault(roles.verifier.target, {})
        if key not in kinds:
            kinds[key] = _Kind(*self._ways, f"round_k{num_speculative_tokens}_b{num_rows}")
        return kinds[key]

    def _warn(self, roles: Roles, reason: str, what: str) -> None:
        if not self._has_warned:
            asked = f"compiled=True was asked for; a round of {type(roles.verifier.target).__name__} is no single graph"
            warnings.warn(f"{asked} ({reason}) and {what}", stacklevel=4)
        self._has_warned = True


def _asking(roles: Roles) -> str:
    """What of a round waits for the host, which no graph does; empty: nothing."""
    layers = [layer for cache in roles.caches if isinstance(cache, RaggedCache) for layer in cache.layers]
    asking = (layer.asks_the_host(roles.width) for layer in layers if isinstance(layer, RecurrentLayer))
    name = next(filter(None, asking), "")
    return f"{name} asks the host how many tokens were kept" if name else ""


def _reason(error: Exception) -> str:
    """What the compiler says first, and where it says so the line of the model that it could not follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:1] + [line for line in lines if line.startswith("Caused by:")][:1]) or "unknown"


class _Kind:
    """Rounds of one K, batch size and way of sampling, compiled, with a code of their own so that only their graphs are tried.

    To check that a graph holds costs as much as two layers. Within a call it is found to hold in two rounds that follow each
    other, the second time behind itself, so that what it leaves behind is what it will find from then on; and once more for each
    other size of the caches. Otherwise it runs at once. Not where code of the user's takes part in a round: that may count.
    """

    def __init__(self, backend: str, is_captured: bool, is_whole: bool, name: str) -> None:
        code = _silent_round.__code__.replace(co_name=name)  # torch knows graphs by code, and by name what sizes have changed
        self._function, self._is_whole = FunctionType(code, _silent_round.__globals__, name), is_whole
        options = SAFELY if backend == "inductor" else {}
        self._compiled: Any = torch.compile(self._function, fullgraph=is_whole, backend=backend, options=options)
        self._verifier: Callable[[], Verifier | None] = lambda: None
        self._last: FunctionType | None = None
        self._recorder = Recorder(is_captured)
        self._sure: dict[Sizes, Callable[..., Result]] = {}

    def __call__(
        self, state: DecodeState, roles: Roles, num_speculative_tokens: int, noise: Noise, hooks: str
    ) -> tuple[DecodeState, Tensor]:
        given, sizes = (state, roles, num_speculative_tokens, noise, hooks), _sizes(roles, hooks) if self._is_whole else ()
        graph = self._graph(given, roles.verifier, sizes) if sizes else None
        if graph is None:
            _leave_open(state, roles)
        return (graph or self._compiled)(*given)

    def _graph(self, given: tuple[Any, ...], verifier: Verifier, sizes: Sizes) -> Callable[..., Result] | None:
        """The graph for these sizes, which is looked for until it is known to hold. None: torch must look, and may make one."""
        if self._verifier() is not verifier:
            self._verifier, self._last, self._sure = ref(verifier), None, {}
        if sizes not in self._sure:
            last, self._last = self._last, self._found(given)
            if last is None or self._last is None or self._last.__code__ is not last.__code__:
                return self._last
            here = [slots for slots, _ in sizes]  # caches never shrink in a call: recordings of smaller ones are let go
            self._sure = {each: graph for each, graph in self._sure.items() if [slots for slots, _ in each] == here}
            self._sure[sizes] = self._recorder.captured(self._last, verifier.target)
        return self._sure[sizes]

    def _found(self, given: tuple[Any, ...]) -> FunctionType | None:
        """The graph that holds for what is given, all its guards evaluated."""
        names = dict(zip(self._function.__code__.co_varnames, given, strict=False))
        entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(self._function.__code__)
        code = next((entry.code for entry in entries if entry.guard_manager.check(names)), None)
        return None if code is None else FunctionType(code, _quick(code, self._function.__globals__))


def _quick(code: CodeType, names: Mapping[str, Any]) -> dict[str, Any]:
    """The globals of a graph's code, with torch's readers of sizes, one for each key and value of each layer, as they are inside:
    from outside they first switch off the tracing of frames, which is off where a graph runs at once. 0.1 ms a round."""
    found = {name: names[name] for name in code.co_names if name in names}
    if found.get(UTILS) is torch._dynamo.utils:
        inside = {name: inspect.unwrap(each) for name, each in vars(torch._dynamo.utils).items() if name in READERS}
        found[UTILS] = SimpleNamespace(**vars(torch._dynamo.utils) | inside)
    return found


UTILS = "__import_torch_dot__dynamo_dot_utils"
READERS = ("call_size", "call_stride", "call_storage_offset")


_KINDS: WeakKeyDictionary[nn.Module, dict[Any, _Kind]] = WeakKeyDictionary()


Sizes = tuple[tuple[int, int], ...]
"""`RaggedCache.sizes` of every cache."""


def _sizes(roles: Roles, hooks: str) -> Sizes:
    """What changes between rounds of a call that have one K, besides numbers in tensors. Empty: nobody knows."""
    is_ours = type(roles.proposer).__module__.startswith(f"{__package__}.") and roles.rule in ACCEPTANCE.values()
    if not is_ours or hooks != NO_HOOKS or roles.sampler.asks_row_by_row:
        return ()
    caches = [cache for cache in roles.caches if type(cache) is RaggedCache]
    return tuple(cache.sizes for cache in caches) if len(caches) == len(roles.caches) else ()


NO_HOOKS = "[]"

SAFELY: dict[str, Any] = {"inplace_buffers": False, "size_asserts": False, "alignment_asserts": False}
"""For inductor. In torch 2.13 it writes in place into a part of a `cat` whose memory it gave away: a draft's tokens, then what
was appended, lay where the head's lengths were. A round's tensors are small; nothing is lost by not writing in place. What the
asserts look at, sizes of buffers by the hundred in every round, is what graphs are made for."""

MOST_GRAPHS = 64
"""Graphs that one process may hold: batch sizes times K, and what else differs between calls."""


class _Silence(Clock):
    """Time is told outside of a graph."""

    def __init__(self) -> None:
        super().__init__({})

    def lap(self, part: str) -> None:
        return


_SILENCE = _Silence()


def _silent_round(
    state: DecodeState, roles: Roles, num_speculative_tokens: int, noise: Noise, hooks: str
) -> tuple[DecodeState, Tensor]:
    """hooks: what is looked at is guarded, so that a graph is for one value of them."""
    assert hooks.startswith("[")
    return decode_round(state, roles, num_speculative_tokens, noise, _SILENCE)


def _hooks(model: nn.Module) -> str:
    """The hooks that are not ours, by number: torch looks at hooks when it makes a graph, and never again."""
    found = [
        (name, number)
        for name, module in model.named_modules()
        for number, hook in (*module._forward_pre_hooks.items(), *module._forward_hooks.items())
        if not str(getattr(hook, "__module__", "")).startswith(__package__)
    ]
    return str(found)


def _leave_open(state: DecodeState, roles: Roles) -> None:
    """Tell the compiler which sizes change from call to call, or while a text grows."""
    growing = [(state.text.tokens, 1)]
    for cache in roles.caches:
        if isinstance(cache, RaggedCache):
            growing += cache.growing()
    for tensor, axis in growing:
        torch._dynamo.maybe_mark_dynamic(tensor, axis)
