"""Layers that remember in a state: linear attention, state-space models, short convolutions, for ragged rows without a rollback.

A window starts from the state behind the committed tokens and leaves it as it is. `commit(counts)` keeps, in every row, the first
counts[b] tokens of the window: the convolution state is a slice of what the window put in, and for the recurrence the mixer's own
arithmetic is run once more over what its projections put out in the window. No weights are read but the small convolution's.

Adding a kind. A mixer that nobody has shown to be exact is refused by name. To show one, add a row to `KINDS`:

    mixer     the name of its class
    inputs    its submodules before the recurrence, with weights: what they put out is recorded, and handed back in the replay
    outputs   its submodules behind the recurrence: skipped in the replay, which wants the state alone
    idle      what `inputs` must put out for a token that leaves the state alone (gates shut, no decay). Without it, the replay runs
              once for every number of tokens that some row kept: slower for batches, right for any recurrence

and hold it to `tests/property/test_recurrent.py`. A layer with convolutions alone (Inkling) has nothing to replay: its row is the
name. The mixer is called as `forward(hidden_states, cache_params=...)` and keeps its recurrent state under number 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer


class Idle(NamedTuple):
    """What a submodule puts out for a token that is not to be remembered.

    width  the mixer's attribute that says how many of the last features; empty: all of them
    """

    module: str
    value: float
    width: str = ""


class RecurrentKind(NamedTuple):
    """How a class of mixers is replayed: see the head of this file."""

    mixer: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    idle: tuple[Idle, ...] = ()


DELTA = {
    "inputs": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    "outputs": ("norm", "out_proj"),
    "idle": (Idle("in_proj_b", -inf), Idle("in_proj_a", -inf)),  # beta = sigmoid(b) = 0 and decay = exp(-A softplus(a)) = 1
}
KEPT = (Idle("b_proj", -inf), Idle("forget_gate", 0.0))
"""Kimi delta attention: beta = sigmoid(b) = 0 and decay = exp(0) = 1."""

KINDS: tuple[RecurrentKind, ...] = (
    RecurrentKind("Qwen3_5GatedDeltaNet", **DELTA),
    RecurrentKind("Qwen3_5MoeGatedDeltaNet", **DELTA),
    RecurrentKind(
        "Qwen3NextGatedDeltaNet",
        inputs=("in_proj_qkvz", "in_proj_ba"),
        outputs=("norm", "out_proj"),
        idle=(Idle("in_proj_ba", -inf),),
    ),
    RecurrentKind(
        "BailingHybridDeltaAttention",
        inputs=("q_proj", "k_proj", "v_proj", "forget_gate", "b_proj", "g_proj"),
        outputs=("o_norm", "o_proj"),
        idle=KEPT,
    ),
    RecurrentKind(
        "Glm5NextTextLinearAttention",
        inputs=("q_proj", "k_proj", "v_proj", "forget_gate", "b_proj", "g_a_proj", "g_b_proj"),
        outputs=("o_norm", "o_proj"),
        idle=KEPT,
    ),
    RecurrentKind(
        "NemotronHMamba2Mixer",
        inputs=("in_proj",),
        outputs=("norm", "out_proj"),
        idle=(Idle("in_proj", -inf, width="num_heads"),),  # a time step softplus(dt) = 0: nothing decays, nothing is added
    ),
)


class LayerPlan(NamedTuple):
    """What a cache holds for one layer.

    layer_type  under which the model looks up the layer's mask           keys   whether there are keys and values
    num_states  how many convolution states; 0: it is not recurrent       mixer  whose recurrence is replayed, if any
    blanks      number of a convolution state -> what stands before the first token, where that is not 0
    """

    layer_type: str
    keys: bool = True
    num_states: int = 0
    mixer: nn.Module | None = None
    blanks: Mapping[int, float] = {}


def kind_of(module: nn.Module) -> RecurrentKind | None:
    """The row of the table that goes with a module."""
    return next((kind for kind in KINDS if kind.mixer == type(module).__name__), None)


class RecurrentLayer(LinearAttentionCacheLayerMixin):
    """The states of one layer, for B rows: what transformers reads is a loan, which models may write into.

    A convolution of k inputs has a tape: the k inputs before the window, then the window's. `commit` moves where it starts.

        tape  c c c | w w w w      starts 0      the window's first token sees  c c c
        commit 2                   starts 2      the next window's first token sees  c w w

    The recurrent state moves with `commit`, by a replay of the window; what the window itself ended in is taken where a row kept
    all of it.
    """

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__(max(plan.num_states, 1))  # type: ignore[no-untyped-call]
        self.record_past = True  # no model is to write a single token into the state it was lent, if it asks
        self._mixer, self._kind = plan.mixer, kind_of(plan.mixer) if plan.mixer is not None else None
        self._blanks = plan.blanks
        self._tapes: dict[int, Tensor] = {}
        self._starts: dict[int, Tensor] = {}
        self._state: Tensor | None = None
        self.open(0)

    def open(self, num_tokens: int, offset: Tensor | None = None, counts: Tensor | None = None) -> None:
        """A window of so many tokens begins, `offset` (B,) behind what is committed; counts (B,) of them will stay, if known."""
        self._num_tokens, self._offset, self._counts = num_tokens, offset, counts
        self._recorded: dict[str, Tensor] = {}
        self._input: Tensor | None = None
        self._seen: set[int] = set()
        self._end: Tensor | None = None
        for index in self._tapes:
            self.conv_states[index] = self._context(index)
        if self._state is not None:
            self.recurrent_states[0] = self._state.clone() if num_tokens == 1 else self._state

    def commit(self, counts: Tensor) -> None:
        """Keep the first counts[b] tokens behind what is committed in row b."""
        if self._recorded:
            self._take_back()
        for index, starts in self._starts.items():
            self._starts[index] = starts + counts.to(starts.device)
        if self._end is not None and self._state is not None:
            self._state = self._kept(counts.to(self._state.device), self._state, self._end)
        self._recorded, self._end = {}, None

    # ── what transformers calls ─────────────────────────────────────────────────────────────────────────────────────────────

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: states are made by the first window."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """conv_states (B, ..., T), the window's inputs -> with those before it, (B, ..., k + T)."""
        size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        if state_idx not in self._tapes:
            blank = torch.full_like(conv_states[..., :1], self._blanks.get(state_idx, 0))
            self.conv_states[state_idx] = self._tapes[state_idx] = blank.repeat_interleave(size, dim=-1)
            self._starts[state_idx] = torch.zeros(len(blank), dtype=torch.long, device=blank.device)
            self.conv_kernel_size[state_idx], self.has_previous_state[state_idx] = size, True
        context = self.conv_states[state_idx]
        assert context is not None
        return self._write(state_idx, context, conv_states[..., -self._num_tokens :])

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """What the window ended in."""
        assert state_idx == 0
        if self._state is None:
            self._state, self.has_previous_state[0] = torch.zeros_like(recurrent_states), True
        self._end = recurrent_states
        return recurrent_states

    # ── convolutions ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _place(self, index: int) -> Tensor:
        """(B,) where on the tape the inputs before the window begin."""
        starts = self._starts[index]
        return starts if self._offset is None else starts + self._offset.to(starts.device)

    def _context(self, index: int) -> Tensor:
        """(B, ..., k) a copy of the inputs before the window."""
        return _taken(self._tapes[index], self._place(index), int(self.conv_kernel_size[index] or 0))

    def _write(self, index: int, context: Tensor, inputs: Tensor) -> Tensor:
        """The window's inputs come onto the tape -> context and inputs."""
        whole = torch.cat([context, inputs], dim=-1)
        if self._offset is None:
            self._tapes[index], self._starts[index] = whole, torch.zeros_like(self._starts[index])
        else:
            tape, behind = self._tapes[index], self._place(index) + context.shape[-1]
            slots = torch.arange(tape.shape[-1] + inputs.shape[-1], device=tape.device)
            fresh = slots >= behind[:, None]
            places = torch.where(fresh, tape.shape[-1] + slots - behind[:, None], slots).clamp(max=len(slots) - 1)
            self._tapes[index] = _gathered(torch.cat([tape, inputs], dim=-1), places)
        self._seen.add(index)
        return whole

    def _take_back(self) -> None:
        """Mixers that write a single token into what they were lent did not hand it in: take it from there."""
        for index in self._tapes.keys() - self._seen if self._num_tokens == 1 else ():
            lent = self.conv_states[index]
            assert lent is not None
            self._write(index, self._context(index), lent[..., -1:])
        if self._end is None:
            self._end = self.recurrent_states[0]

    # ── the recurrence ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def hooks(self) -> list[Any]:
        """Listen to the mixer's projections; -> handles, to be removed behind the forward pass."""
        names = self._kind.inputs if self._kind else ()
        modules = dict(self._mixer.named_children()) if self._mixer is not None else {}
        return [modules[name].register_forward_hook(partial(self._hear, name)) for name in names]

    def _hear(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._recorded[name], self._input = output, inputs[0]

    def _kept(self, counts: Tensor, state: Tensor, end: Tensor) -> Tensor:
        """The state behind the first counts[b] tokens of the window."""
        some = (counts > 0).view(-1, *[1] * (state.dim() - 1))
        if self._num_tokens == 1 or bool((counts == self._num_tokens).all()):  # a host read, where the host reads counts anyway
            return torch.where(some, end, state)
        assert self._kind is not None
        if self._kind.idle:
            return self._replayed(self._num_tokens, counts)
        for length in sorted(set(counts.tolist()) - {0}):
            state = torch.where((counts == length).view(some.shape), self._replayed(length), state)
        return state

    def _replayed(self, length: int, counts: Tensor | None = None) -> Tensor:
        """The state behind the first `length` tokens of the window, of which those from counts[b] on leave it alone."""
        mixer, kind = self._mixer, self._kind
        assert mixer is not None and kind is not None and self._input is not None
        stand_ins: dict[str, Any] = {name: _said(output[:, :length]) for name, output in self._recorded.items()}
        for idle in kind.idle if counts is not None else ():
            stand_ins[idle.module] = _said(_idled(self._recorded[idle.module], counts, idle, mixer))
        twin = copy.copy(mixer)
        twin._modules = {**mixer._modules, **stand_ins, **dict.fromkeys(kind.outputs, _passed)}
        states = self._states_before()
        type(mixer).forward(twin, self._input[:, :length], cache_params=Cache(layers=[states] * (int(mixer.layer_idx) + 1)))  # type: ignore[arg-type]
        result = states.recurrent_states[0]
        assert result is not None
        return result

    def _states_before(self) -> LinearAttentionLayer:
        """What the window began with, for a mixer to write into."""
        states = LinearAttentionLayer()  # type: ignore[no-untyped-call]
        states.record_past = True
        for index, tape in self._tapes.items():
            states.conv_states[index] = tape[..., : self.conv_kernel_size[index]].clone()
        states.recurrent_states[0] = None if self._state is None else self._state.clone()
        for flags in (states.is_conv_states_initialized, states.is_recurrent_states_initialized, states.has_previous_state):
            flags[0] = True
        return states


@contextmanager
def listening(cache: Cache) -> Iterator[None]:
    """What mixers put out in here is recorded by the recurrent layers of a cache."""
    layers = [layer for layer in cache.layers if isinstance(layer, RecurrentLayer)]
    handles = [handle for layer in layers for handle in layer.hooks()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gathered(tape: Tensor, places: Tensor) -> Tensor:
    """tape (B, ..., n), places (B, m) -> (B, ..., m)"""
    shape = (len(tape), *[1] * (tape.dim() - 2), places.shape[1])
    return tape.gather(-1, places.view(shape).expand(*tape.shape[:-1], -1))


def _taken(tape: Tensor, starts: Tensor, size: int) -> Tensor:
    """tape (B, ..., n), starts (B,) -> (B, ..., size)"""
    return _gathered(tape, starts[:, None] + torch.arange(size, device=tape.device))


def _idled(output: Tensor, counts: Tensor | None, idle: Idle, mixer: nn.Module) -> Tensor:
    """output (B, T, ..., F) with the idle value in the tokens from counts[b] on, in all features or in the last ones."""
    assert counts is not None
    refused = torch.arange(output.shape[1], device=output.device) >= counts[:, None]
    features = torch.arange(output.shape[-1], device=output.device)
    width = getattr(mixer, idle.width) if idle.width else output.shape[-1]
    where = refused.view(*refused.shape, *[1] * (output.dim() - 2)) & (features >= output.shape[-1] - width)
    return output.masked_fill(where, idle.value)


def _said(output: Tensor) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: output


def _passed(first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return first
