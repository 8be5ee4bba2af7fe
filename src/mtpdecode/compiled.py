"""Rounds as compiled graphs: drafting, scoring, acceptance, stopping and commit in one, for every batch size and K."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import nn

from .cache import RaggedCache
from .loop import Clock, Roles, decode_round
from .recurrent import RecurrentLayer
from .state import DecodeState, Noise, Verdict
from .verifier import Verifier


class CompiledRound:
    """`decode_round`, compiled whole; a model that cannot be traced whole is compiled in pieces, with a warning that says why.

    A graph holds for one batch size, one K and one kind of sampling. Lengths are left open, so that a text may grow. Our hooks
    are there before a round begins, and become part of its graph. So do hooks of the user's, and others are another graph. What
    asks the host in the midst of a round, a recurrence how many tokens were kept, or a model how often to loop, runs as without
    compilation, with a warning.

    backend  of `torch.compile`
    """

    def __init__(self, backend: str = "inductor") -> None:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
        self._backend = backend
        self._options = SAFELY if backend == "inductor" else {}
        self._step: Any = torch.compile(_silent_round, fullgraph=True, backend=backend, options=self._options)
        self._is_whole, self._has_warned = True, False
        self._verifier: Callable[[], Verifier | None] = lambda: None
        self._asking = self._untraceable = self._hooks = ""

    def __call__(
        self, state: DecodeState, roles: Roles, num_speculative_tokens: int, noise: Noise, clock: Clock
    ) -> tuple[DecodeState, Verdict]:
        if self._verifier() is not roles.verifier:  # a new call; a walk through the model is too long for every round
            self._verifier, self._asking, self._hooks = ref(roles.verifier), _asking(roles), _hooks(roles.verifier.target)
        if why := self._asking or self._untraceable:
            self._warn(roles, why, "runs as without compiled=True.")
            return decode_round(state, roles, num_speculative_tokens, noise, clock)
        _leave_open(state, roles)
        try:
            result: tuple[DecodeState, Verdict] = self._step(state, roles, num_speculative_tokens, noise, self._hooks)
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
            if not self._is_whole:
                raise
            if not isinstance(error, torch._dynamo.exc.Unsupported):  # in pieces it would come again, in the midst of a round
                self._untraceable = _reason(error)
                return self(state, roles, num_speculative_tokens, noise, clock)
            self._in_pieces(roles, error)
            result = self._step(state, roles, num_speculative_tokens, noise, self._hooks)
        clock.lap("round")
        return result

    def _in_pieces(self, roles: Roles, error: Exception) -> None:
        self._warn(roles, _reason(error), "is compiled in pieces, which is slower than one graph.")
        self._step, self._is_whole = torch.compile(_silent_round, backend=self._backend, options=self._options), False

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


SAFELY: dict[str, Any] = {"inplace_buffers": False}
"""inductor of torch 2.13 writes in place into a part of a `cat` whose memory it has given away: a draft's tokens, then what was
appended, lay where the head's lengths were. A round's tensors are small; nothing is lost by not writing in place."""

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
) -> tuple[DecodeState, Verdict]:
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
