"""Layers that remember in a state: linear attention, state-space models, short convolutions, for ragged rows without a rollback.

A window starts from the state behind the committed tokens and leaves it as it is. `commit(counts)` keeps, in every row, the first
counts[b] tokens of the window: the convolution state is a slice of what the window put in, and the recurrence is run once more
from the old state over what the mixer's projections put out in the window. No weights are read but the small convolution's.

Adding a kind. A mixer that nobody has shown to be exact is refused by name. To show one, add a row to `KINDS`:

    mixer     the name of its class
    inputs    its submodules before the recurrence, with weights: what they put out is recorded, and handed back in the replay
    outputs   its submodules behind the recurrence: skipped in the replay, which wants the state alone
    terms     what a token does to the state, if that fits `Terms`: one short loop then serves all rows at once. Without it the
              mixer's own forward runs once for every number of tokens that some row kept: slower, and right for any recurrence

and hold it to `tests/property/test_recurrent.py`, which takes both ways. A layer with convolutions alone (Inkling) has nothing to
replay: its row is the name. The mixer is called as `forward(hidden_states, cache)`, with its state under number 0.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import expm1, inf, log
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

FEW = 16
"""Windows of at most so many tokens are replayed token by token; longer ones, of a prompt, by the mixer's own chunks."""


class Terms(NamedTuple):
    """What T tokens do to a state S (B, H, Dk, Dv), one after the other, in float32:

        S <- decay S        then, with beta,    S <- S + key (beta (value - key S))        without,    S <- S + key value

    keys    (B, T, H, Dk)    values  (B, T, H, Dv)
    decays  (B, T, H), or (B, T, H, Dk) where every channel has its own
    betas   (B, T, H), or None
    """

    keys: Tensor
    values: Tensor
    decays: Tensor
    betas: Tensor | None = None

    def applied(self, state: Tensor, counts: Tensor) -> Tensor:
        """The state behind the first counts[b] tokens: to the others the key is 0 and the decay 1."""
        kept = torch.arange(self.keys.shape[1], device=state.device) < counts[:, None]
        keys = torch.where(_wide(kept, self.keys), self.keys, 0.0)
        decays = torch.where(_wide(kept, self.decays), self.decays, 1.0)
        decays = decays[..., None] if decays.dim() == keys.dim() else decays[..., None, None]
        for step in range(int(keys.shape[1])):
            state, key, value = state * decays[:, step], keys[:, step, :, :, None], self.values[:, step, :, None]
            if self.betas is not None:
                value = self.betas[:, step, :, None, None] * (value - (state * key).sum(-2, keepdim=True))
            state = state + key * value
        return state


class RecurrentKind(NamedTuple):
    """How a class of mixers is replayed: see the head of this file.

    terms   (mixer, what its inputs put out, what came out of its convolution (B, T, C)) -> Terms
    blanks  (number of a convolution state, attribute that says what stands before the first token), where that is not 0
    limits  attribute (least, largest): to this the mixer holds the time steps of many tokens, and not that of a single one.
            Plain decoding so holds the prompt's tokens to it and no others, and so do we, whatever the windows
    """

    mixer: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    terms: Callable[[Any, Mapping[str, Tensor], Tensor], Terms] | None = None
    blanks: tuple[tuple[int, str], ...] = ()
    limits: str = ""


def delta_terms(mixer: Any, mixed: Tensor, a: Tensor, b: Tensor) -> Terms:
    """Gated delta networks. mixed (B, T, C): query, key and value behind the convolution; a, b (B, T, H): the gates."""
    _, keys, values = torch.split(mixed.float(), [mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=-1)
    keys, values = _normed(_heads(keys, mixer.head_k_dim)), _heads(values, mixer.head_v_dim)
    decays = torch.exp(-mixer.A_log.float().exp() * F.softplus(a.float() + mixer.dt_bias))
    return Terms(keys.repeat_interleave(mixer.num_v_heads // mixer.num_k_heads, dim=2), values, decays, b.sigmoid().float())


def _qwen3_next_terms(mixer: Any, said: Mapping[str, Tensor], mixed: Tensor) -> Terms:
    *_, b, a = mixer.fix_query_key_value_ordering(said["in_proj_qkvz"], said["in_proj_ba"])
    return delta_terms(mixer, mixed, a, b)


def _qwen3_5_terms(mixer: Any, said: Mapping[str, Tensor], mixed: Tensor) -> Terms:
    return delta_terms(mixer, mixed, said["in_proj_a"], said["in_proj_b"])


def _kimi_terms(mixer: Any, said: Mapping[str, Tensor], mixed: Tensor) -> Terms:
    """Kimi delta attention: every channel of a key has its own decay."""
    _, keys, values = (_heads(part, mixer.head_dim) for part in mixed.float().chunk(3, dim=-1))
    return Terms(_normed(keys), values, said["forget_gate"].float().exp(), said["b_proj"].sigmoid().float())


def _mamba2_terms(mixer: Any, said: Mapping[str, Tensor], mixed: Tensor) -> Terms:
    """Mamba-2: a state (B, H, head size, state size) takes in x, as much as the time step says, where B says."""
    sizes = [mixer.intermediate_size, *2 * [mixer.n_groups * mixer.ssm_state_size]]
    x, where, _ = torch.split(mixed.float(), sizes, dim=-1)
    where = _heads(where, mixer.ssm_state_size).repeat_interleave(mixer.num_heads // mixer.n_groups, dim=2)
    steps = F.softplus(said["in_proj"][..., -mixer.num_heads :] + mixer.dt_bias).float()
    return Terms(_heads(x, mixer.head_dim) * steps[..., None], where, torch.exp(-mixer.A_log.float().exp() * steps))


DELTA = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
KIMI = ("q_proj", "k_proj", "v_proj", "forget_gate", "b_proj")
KINDS: tuple[RecurrentKind, ...] = (
    RecurrentKind("InklingShortConvolution"),
    RecurrentKind("Qwen3NextGatedDeltaNet", ("in_proj_qkvz", "in_proj_ba"), ("norm", "out_proj"), _qwen3_next_terms),
    RecurrentKind("Qwen3_5GatedDeltaNet", DELTA, ("norm", "out_proj"), _qwen3_5_terms),
    RecurrentKind("Qwen3_5MoeGatedDeltaNet", DELTA, ("norm", "out_proj"), _qwen3_5_terms),
    RecurrentKind("Qwen4ExpTextGatedDeltaNet", DELTA, ("norm", "out_proj"), _qwen3_5_terms),
    RecurrentKind("NemotronHMamba2Mixer", ("in_proj",), ("norm", "out_proj"), _mamba2_terms, limits="time_step_limit"),
    RecurrentKind("BailingHybridDeltaAttention", (*KIMI, "g_proj"), ("o_norm", "o_proj"), _kimi_terms),
    RecurrentKind("Glm5NextTextLinearAttention", (*KIMI, "g_a_proj", "g_b_proj"), ("o_norm", "o_proj"), _kimi_terms),
    RecurrentKind("Qwen4ExpTextNGramEmbedding", blanks=((2, "eos_token_id"),)),  # a convolution's state of token ids
)


class LayerPlan(NamedTuple):
    """What a cache holds for one layer.

    layer_type  under which the model looks up the layer's mask           keys   whether there are keys and values
    num_states  how many convolution states; 0: it is not recurrent       mixer  whose recurrence is replayed, if any
    blanks      number of a convolution state -> what stands before the first token, where that is not 0
    block_size  how many tokens `mixer` compresses into one more key, if it does
    aligned     whether the model goes by the cache's length, so that all rows must end there
    """

    layer_type: str
    keys: bool = True
    num_states: int = 0
    mixer: nn.Module | None = None
    blanks: Mapping[int, float] = {}
    block_size: int = 0
    aligned: bool = False


def kind_of(module: nn.Module) -> RecurrentKind | None:
    """The row of the table that goes with a module."""
    return next((kind for kind in KINDS if kind.mixer == type(module).__name__), None)


Cell = tuple[dict[Any, Any], Any]
"""Where a tensor is held, and under which name."""


class HookedLayer(ABC):
    """A layer of a cache that needs hooks on the model's own modules while windows go through them."""

    @abstractmethod
    def hooks(self) -> list[Any]:
        """Register them; -> handles, to be removed behind the forward pass, or the round."""


class RecurrentLayer(LinearAttentionCacheLayerMixin, HookedLayer):
    """The states of one layer, for B rows: what transformers reads is a loan, which models may write into.

    A convolution of k inputs has a tape: the k inputs before the window, then the window's. `commit` moves where it starts.

        tape  c c c | w w w w      starts 0      the window's first token sees  c c c
        commit 2                   starts 2      the next window's first token sees  c w w

    The recurrent state moves with `commit`, by a replay of the window; what the window itself ended in is taken where a row kept
    all of it.
    """

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__(max(plan.num_states, 1))
        self._plan = plan
        self.record_past = True  # no model is to write a single token into the state it was lent, if it asks
        self._mixer, self._kind = plan.mixer, kind_of(plan.mixer) if plan.mixer is not None else None
        self._blanks, limits = plan.blanks, self._kind.limits if self._kind else ""
        self._limits = _Limits(plan.mixer, limits) if limits else None
        self._ears = [_Ear(self, name) for name in self._kind.inputs] if self._kind else []
        self._tapes: dict[int, Tensor] = {}
        self._starts: dict[int, Tensor] = {}
        self._state: Tensor | None = None
        self.open(0)

    def forget(self) -> None:
        """As new: another text begins."""
        RecurrentLayer.__init__(self, self._plan)

    @property
    def tapes(self) -> list[Tensor]:
        """(B, ..., n) of each convolution: n goes by the last window."""
        return list(self._tapes.values())

    def moving(self) -> list[Cell]:
        """Where every tensor is held that one window leaves for the next."""
        held: list[Cell] = [(places, index) for places in (self._tapes, self._starts) for index in places]
        return held if self._state is None else [*held, (vars(self), "_state")]

    def open(self, num_tokens: int, offset: Tensor | None = None, prompt: Tensor | None = None) -> None:
        """A window of so many tokens begins, `offset` (B,) behind what is committed; the first prompt (B,) are of the prompt."""
        self._num_tokens, self._offset, self._prompt = num_tokens, offset, prompt
        self._is_inside = num_tokens > FEW and prompt is not None and bool((prompt > num_tokens).all())
        self._recorded: dict[str, Tensor] = {}
        self._input: Tensor | None = None
        self._seen: set[int] = set()
        self._end: Tensor | None = None
        for index in self._tapes:
            self.conv_states[index] = self._context(index)
        if self._state is not None:
            self.recurrent_states[0] = self._state.clone() if num_tokens == 1 else self._state

    def asks_the_host(self, num_tokens: int) -> str:
        """What makes a commit of so many tokens ask the host how many were kept; empty: nothing does."""
        if self._kind is None or not self._kind.inputs:
            return ""
        name = f"the replay of {self._kind.mixer}"
        if self._kind.terms is None:
            return name
        return f"{name} over {num_tokens} tokens, more than {FEW}," if num_tokens > FEW else ""

    def commit(self, counts: Tensor) -> None:
        """Keep the first counts[b] tokens behind what is committed in row b."""
        if self._recorded:
            self._take_back()
        for index, starts in self._starts.items():
            self._starts[index] = starts + counts.to(starts.device)
        if self._end is not None and self._state is not None:
            self._state = self._kept(counts.to(self._state.device), self._state, self._end)
        self._recorded, self._end, self._is_inside = {}, None, False

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
        if self._is_inside:  # all of it will be committed: what the next window sees is the end
            self._tapes[index] = whole[..., -context.shape[-1] :].clone()
            self._starts[index] = torch.full_like(self._starts[index], -self._num_tokens)
        elif self._offset is None:
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
        if self._mixer is None:
            return []
        modules = dict(self._mixer.named_children())
        handles: list[Any] = [modules[ear.name].register_forward_hook(ear.hear) for ear in self._ears]
        return handles + ([self._limits.lifted()] if self._limits else [])

    def _hear(self, name: str, given: Tensor, output: Tensor) -> Tensor | None:
        """Inside the prompt nothing is recorded: every row will keep the whole window, and little of it is held in memory."""
        limits, prompt = self._limits, self._prompt
        limited = None if limits is None or prompt is None else limits.applied(output, prompt.to(output.device))
        if not self._is_inside:
            self._recorded[name], self._input = output if limited is None else limited, given
        return limited

    def _kept(self, counts: Tensor, state: Tensor, end: Tensor) -> Tensor:
        """The state behind the first counts[b] tokens of the window, which began with `state` and ended in `end`."""
        kind, whole = self._kind, counts == self._num_tokens
        assert kind is not None
        if self._num_tokens == 1:
            return torch.where(_wide(whole, state), end, state)
        if kind.terms is not None and self._num_tokens <= FEW:  # without asking the host what was kept
            return kind.terms(self._mixer, self._recorded, self._convolved()).applied(state.float(), counts).to(state.dtype)
        if bool(whole.all()):
            return end
        assert not self._is_inside, "a window that ends inside the prompt is kept whole"
        state = torch.where(_wide(whole, state), end, state)
        for length in sorted(set(counts.tolist()) - {0, self._num_tokens}):
            rows = (counts == length).nonzero()[:, 0]
            state = state.index_copy(0, rows, self._replayed(rows, length))
        return state

    def _convolved(self) -> Tensor:
        """(B, T, C) what the mixer's convolution made of the window."""
        mixer: Any = self._mixer
        inputs = self._tapes[0][..., 1:]
        outputs = F.conv1d(inputs.to(mixer.conv1d.weight.dtype), mixer.conv1d.weight, mixer.conv1d.bias, groups=inputs.shape[1])
        return ACT2FN[mixer.activation](outputs).to(inputs.dtype).transpose(1, 2)  # type: ignore[no-any-return]

    def _replayed(self, rows: Tensor, length: int) -> Tensor:
        """The state of some rows behind the first `length` tokens of the window, by the mixer's own forward."""
        mixer, kind = self._mixer, self._kind
        assert mixer is not None
        assert kind is not None
        assert self._input is not None
        stand_ins: dict[str, Any] = dict.fromkeys(kind.outputs, _passed)
        stand_ins |= {name: _returning(output[rows, :length]) for name, output in self._recorded.items()}
        twin = copy.copy(mixer)
        if kind.limits:
            setattr(twin, kind.limits, UNLIMITED)  # what it is handed is within the limits where it is to be
        twin._modules = {**mixer._modules, **stand_ins}
        states, index = self._states_before(rows), int(mixer.layer_idx)  # type: ignore[arg-type]
        type(mixer).forward(twin, self._input[rows, :length], Cache(layers=[states] * (index + 1)))
        result = states.recurrent_states[0]
        assert result is not None
        return result

    def _states_before(self, rows: Tensor) -> LinearAttentionLayer:
        """What the window began with, for a mixer to write into."""
        states = LinearAttentionLayer()
        states.record_past = True
        for index, tape in self._tapes.items():
            states.conv_states[index] = tape[rows][..., : self.conv_kernel_size[index]]
        states.recurrent_states[0] = None if self._state is None else self._state[rows]
        for flags in (states.is_conv_states_initialized, states.is_recurrent_states_initialized, states.has_previous_state):
            flags[0] = True
        return states


class _Ear:
    """Hears one projection of a layer's mixer. The layer, and the states it holds, are not kept alive by it."""

    def __init__(self, layer: RecurrentLayer, name: str) -> None:
        self._layer, self.name = ref(layer), name

    def hear(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        layer = self._layer()
        assert layer is not None  # it is hooked only while its cache is in use
        return layer._hear(self.name, inputs[0], output)


UNLIMITED = (0.0, inf)


class _Limits:
    """The limits to which a mixer holds its time steps: lifted while we hold them to it ourselves, and put back by `remove`."""

    def __init__(self, mixer: Any, attribute: str) -> None:
        self.mixer, self.attribute, self.limits = mixer, attribute, getattr(mixer, attribute)

    def lifted(self) -> _Limits:
        setattr(self.mixer, self.attribute, UNLIMITED)
        return self

    def remove(self) -> None:
        setattr(self.mixer, self.attribute, self.limits)

    def applied(self, output: Tensor, prompt: Tensor) -> Tensor:
        """output (B, T, F), its last features time steps before softplus: within the limits in the first prompt (B,) tokens."""
        bias = self.mixer.dt_bias
        least, largest = (_before_softplus(limit) - bias for limit in self.limits)
        rest, steps = output[..., : -len(bias)], output[..., -len(bias) :]
        within = torch.minimum(torch.maximum(steps, least), largest).to(steps.dtype)
        held = torch.arange(output.shape[1], device=output.device) < prompt[:, None]
        return torch.cat([rest, torch.where(held[..., None], within, steps)], dim=-1)


def _before_softplus(value: float) -> float:
    """What softplus makes this value of."""
    return value + log(-expm1(-value)) if value else -inf


@contextmanager
def listening(cache: Cache) -> Iterator[None]:
    """In here, what mixers put out is heard by the layers of a cache."""
    layers = [layer for layer in cache.layers if isinstance(layer, HookedLayer)]
    handles = [handle for layer in layers for handle in layer.hooks()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _heads(x: Tensor, size: int) -> Tensor:
    """x (B, T, H * size) -> (B, T, H, size)"""
    return x.reshape(*x.shape[:-1], -1, size)


def _normed(keys: Tensor) -> Tensor:
    """Keys of length 1."""
    return keys * torch.rsqrt(keys.square().sum(-1, keepdim=True) + 1e-6)


def _gathered(tape: Tensor, places: Tensor) -> Tensor:
    """tape (B, ..., n), places (B, m) -> (B, ..., m)"""
    shape = (len(tape), *[1] * (tape.dim() - 2), places.shape[1])
    return tape.gather(-1, places.view(shape).expand(*tape.shape[:-1], -1))


def _taken(tape: Tensor, starts: Tensor, size: int) -> Tensor:
    """tape (B, ..., n), starts (B,) -> (B, ..., size)"""
    places = starts[:, None] + torch.arange(size, device=tape.device)
    return _gathered(tape, places.clamp(max=tape.shape[-1] - 1))  # where a layer sat a window out, nothing is read behind it


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    """rows (B,) or (B, T) with axes behind, as many as `like` has."""
    return rows.view(*rows.shape, *[1] * (like.dim() - rows.dim()))


def _returning(output: Tensor) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: output


def _passed(first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return first
