"""The tickets that pass between the roles: NamedTuples of tensors, and the randomness of one round.

Letters in shapes, the same everywhere: B rows, T window tokens, K draft tokens, W the window of a round (its K, plus one),
S text slots, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache


class Draft(NamedTuple):
    """K proposed tokens per row.

    tokens  (B, K) int64
    probs   (B, K, V) float, the law that each token was drawn from; None where a token was not drawn but chosen (q is one-hot)
    """

    tokens: Tensor
    probs: Tensor | None


class Verdict(NamedTuple):
    """What one round appends.

    tokens  (B, K+1) int64   accepted draft tokens, then one token of the target's, then padding
    counts  (B,) int64       how many of them are real, 1..K+1; 0 for rows that had finished
    """

    tokens: Tensor
    counts: Tensor

    def told(self, done: Tensor) -> Tensor:
        """done (B,) bool -> (B, K+3) int64, what the host reads of a round: a row is  count  done  token token token ..."""
        return torch.cat([self.counts[:, None], done[:, None].long(), self.tokens], dim=1)


class Window(NamedTuple):
    """Where the next T tokens of every row go.

    positions  (B, T) int64, the slots, which are the rotary positions unless there are axes
    mask       (B, 1, T, slots): bool for sdpa, additive for eager attention; or one of them per layer type, None for types that
               have no keys
    cache      the transformers Cache to hand to the model
    axes       (3, B, T) int64 or None: the rotary positions in time, height and width, where images made them differ
    """

    positions: Tensor
    mask: Tensor | dict[str, Tensor | None]
    cache: Cache
    axes: Tensor | None = None


class Text(NamedTuple):
    """The tokens that processors and proposers may look at, left-aligned. There is one for a call; what grows is its lengths.

        tokens   a b c d x y . .      lengths 4      x, y: drafts past the end

    tokens   (B, S) int64
    lengths  (B,) int64        how many are certain
    starts   (B,) int64        the first slot that holds a token; larger than 0 only for prompts given as embeddings
    """

    tokens: Tensor
    lengths: Tensor
    starts: Tensor

    def with_draft(self, tokens: Tensor, start: int = 0) -> Text:
        """tokens (B, k) written at `lengths + start`, in place: what stands past the end is nobody's. The lengths stay."""
        slots = self.lengths[:, None] + torch.arange(start, start + tokens.shape[1], device=tokens.device)
        self.tokens.index_put_((torch.arange(len(slots), device=slots.device)[:, None], slots), tokens)
        return self

    def at(self, slots: Tensor) -> Tensor:
        """slots (B, T) -> tokens (B, T); slots past the end repeat the last."""
        return self.tokens.gather(1, slots.clamp(max=self.tokens.shape[1] - 1))

    def prefix(self, row: int, num_draft_tokens: int = 0) -> Tensor:
        """(1, n) what stands before draft token `num_draft_tokens` of a row."""
        return self.tokens[row : row + 1, int(self.starts[row]) : int(self.lengths[row]) + num_draft_tokens]


class Fresh(NamedTuple):
    """The target's hidden states that a head has not yet absorbed for good, oldest first.

        states   h3 h4 .  .      counts 2      the last real one stands before the pending token

    states  (B, R, D)        counts  (B,) int64, how many of the R are real
    """

    states: Tensor
    counts: Tensor

    def last(self, num: int) -> Fresh:
        """Only the last num real ones: (B, num, D)."""
        kept = self.counts.clamp(max=num)
        return Fresh(_shifted(self.states, self.counts - kept, num), kept)

    def extended(self, states: Tensor, counts: Tensor, width: int) -> Fresh:
        """states (B, n, D), the first counts (B,) of them real, put behind the real ones: (B, width, D)."""
        if not self.states.shape[1]:
            return Fresh(_shifted(states, torch.zeros_like(counts), width), counts)
        old, new = _shifted(self.states, torch.zeros_like(counts), width), _shifted(states, -self.counts, width)
        is_old = torch.arange(width, device=counts.device) < self.counts[:, None]
        return Fresh(torch.where(is_old[..., None], old, new), self.counts + counts)


def _shifted(states: Tensor, offsets: Tensor, width: int) -> Tensor:
    """states (B, n, D) -> (B, width, D), starting at row offsets (B,); what lies outside repeats the border."""
    rows = (offsets[:, None] + torch.arange(width, device=states.device)).clamp(0, states.shape[1] - 1)
    return states.gather(1, rows[..., None].expand(-1, -1, states.shape[-1]))


class DecodeState(NamedTuple):
    """Everything that changes between rounds, in tensors whose shape never does. Only the text's tokens are written in place.

        tokens   a b c d e . .      lengths 5      target's cache: a b c d      pending: e
        tokens   x y z . . . .      lengths 3      target's cache: x y          pending: z

    text     tokens (B, S), lengths (B,), starts (B,)
    fresh    states (B, W + lag, D), counts (B,)
    done     (B,) bool
    """

    text: Text
    fresh: Fresh
    done: Tensor

    def appended(self, verdict: Verdict, fresh: Fresh, done: Tensor) -> DecodeState:
        """The state after a round; S leaves room for the whole verdict, so nothing is checked."""
        tokens, lengths, starts = self.text.with_draft(verdict.tokens)
        return DecodeState(Text(tokens, lengths + verdict.counts, starts), fresh, done)  # torch 2.11 loses `_replace`


class Prompt(NamedTuple):
    """What is decoded from, left-aligned whatever the padding was.

    tokens     (B, P) int64       lengths  (B,) int64
    embeds     (B, P, D) or None: given instead of tokens, as multimodal models do; then tokens are placeholders
    per_layer  (B, P, L, d) or None: what goes with embeds in models that look up an embedding for each layer
    types      (B, P) int64 or None: 0 for text, 1 for tokens of an image, 2 of a video, 3 of a sound
    media      what else the model's forward reads with the prompt, by its own keywords: pixel_values and the like
    axes       (3, B, P) int64 or None: positions in time, height and width, where the parts of an image share some
    """

    tokens: Tensor
    lengths: Tensor
    embeds: Tensor | None = None
    per_layer: Tensor | None = None
    types: Tensor | None = None
    media: Mapping[str, Any] = MappingProxyType({})
    axes: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it must be read in one forward pass: tokens of one image may see each other."""
        return bool(self.media) or self.types is not None

    def embedded(self, embeds: Tensor, slots: Tensor) -> Tensor:
        """embeds (B, T, D) of the tokens at slots (B, T), with the prompt's own embeddings where it came with some."""
        return self._inserted(self.embeds, embeds, slots)

    def inputs(self, inputs: dict[str, Tensor], slots: Tensor) -> dict[str, Tensor]:
        """The same for everything that a model makes of tokens before its first layer: inputs_embeds and per_layer_inputs."""
        given = {"inputs_embeds": self.embeds, "per_layer_inputs": self.per_layer}
        return {name: self._inserted(given[name], own, slots) for name, own in inputs.items()}

    def placed(self, window: Window) -> Window:
        """A window whose rotary positions are the prompt's own, if it has some; behind it each axis goes on from the last one.

        tokens  a i i i i b | c d       slots 0 1 2 3 4 5 | 6 7         an image of 2 x 2
        height  0 1 1 2 2 3 | 4 5       width 0 1 2 1 2 3 | 4 5
        """
        if self.axes is None:
            return window
        last, slots = self.lengths[:, None] - 1, window.positions
        known = self.axes.gather(2, slots.minimum(last).expand(3, -1, -1))
        return window._replace(axes=known + (slots - last).clamp(min=0))

    def _inserted(self, given: Tensor | None, own: Tensor, slots: Tensor) -> Tensor:
        """own (B, T, ...) with given (B, P, ...) where slots (B, T) are the prompt's."""
        if given is None:
            return own
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        inside = (slots < self.lengths[:, None]).view(*slots.shape, *[1] * (own.dim() - 2))
        return torch.where(inside, given[rows, slots.clamp(max=given.shape[1] - 1)], own)


class Purpose:
    """What a random number is for. Different purposes of one position are independent of each other."""

    TARGET, DRAFT, ACCEPT = 1, 2, 3


class Noise(NamedTuple):
    """All randomness, as a pure function of (seed of the row, absolute position, purpose, token): no stream, no state.

    A counter-based hash in int32 arithmetic, so that it gives the same numbers on every device, for every batch and every K,
    and lives inside a compiled graph. The mixing step is the 32-bit finaliser of MurmurHash3 (Appleby, public domain).

    seeds   (B,) int64
    starts  (B,) int64, where the current round began; None outside of rounds
    """

    seeds: Tensor
    starts: Tensor | None = None

    def of_round(self, starts: Tensor) -> Noise:
        """With fresh DRAFT and ACCEPT numbers for the round that begins at positions starts (B,).

        A rule may look at the tests of tokens that it then refuses, as block verification does: those numbers have decided
        something and must not come again when their positions are drafted anew. TARGET numbers belong to their position alone;
        each is used once, for the token that is appended there.
        """
        return self._replace(starts=starts)

    def exponential(self, positions: Tensor, purpose: int, num_tokens: int) -> Tensor:
        """(B, V) float32, Exp(1), one for each token; positions (B,)."""
        tokens = torch.arange(num_tokens, device=self.seeds.device, dtype=torch.int32)
        high, low = self._keys(positions, purpose)
        bits = _mix(_mix(tokens * -1640531527 + low[:, None]) ^ high[:, None])
        return -torch.log1p(-_to_unit(bits))

    def uniform(self, positions: Tensor, purpose: int) -> Tensor:
        """float32 in the open interval (0, 1), one for each of positions (B, n)."""
        high, low = (key.reshape(positions.shape) for key in self._keys(positions, purpose))
        return _to_unit(_mix(_mix(low) ^ high))

    def _keys(self, positions: Tensor, purpose: int) -> tuple[Tensor, Tensor]:
        """Two int32 keys per entry of positions (B,) or (B, n)."""
        rows = [-1] + [1] * (positions.dim() - 1)
        seeds = self.seeds.reshape(rows).expand_as(positions)
        words = [seeds, seeds >> 32, positions, torch.full_like(positions, purpose)]
        if self.starts is not None and purpose != Purpose.TARGET:
            words.append(self.starts.reshape(rows).expand_as(positions))
        low, high = torch.zeros_like(positions, dtype=torch.int32), torch.ones_like(positions, dtype=torch.int32)
        for word in words:
            low = _mix(low ^ _low_bits(word))
            high = _mix(high * 5 + low)
        return high, low


def _low_bits(x: Tensor) -> Tensor:
    """The low 32 bits of int64, as int32."""
    x = x & 0xFFFFFFFF
    return torch.where(x >= 2**31, x - 2**32, x).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    """A bijection of int32 whose output bits each depend on every input bit."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387
    return x ^ ((x >> 16) & 0xFFFF)


def _to_unit(bits: Tensor) -> Tensor:
    """int32 -> float32 in (0, 1), from 31 bits. Exact near 0, where races between small numbers are decided; never 1."""
    return (((bits & 0x7FFFFFFF).to(torch.float32) + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
