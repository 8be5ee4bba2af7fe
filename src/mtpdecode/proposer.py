"""Proposers guess the next tokens of every row. Whatever they guess, the output's law is the target's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from .cache import KVCacheManager
from .errors import GenerationError
from .head import MTPHead
from .indexer import Choices, chosen, narrowed
from .sampling import Sampler, largest, race
from .state import DecodeState, Draft, Fresh, Noise, Prompt, Purpose, Text, Window

DraftSampling = Literal["sample", "greedy"]


class Call(NamedTuple):
    """What a proposer learns when a call of `generate` begins.

    prompt       what is decoded from                    sampler    the target's processors, for the draft to use too
    max_length   the largest K of this call              sampling   draw draft tokens, or take the likeliest
    purpose      which of the row's random numbers to draw drafts with
    past         the target's own keys and values: to be looked at, never written
    """

    prompt: Prompt
    sampler: Sampler
    max_length: int
    sampling: DraftSampling
    purpose: int = Purpose.DRAFT
    past: KVCacheManager | None = None


class Proposer(ABC):
    """Guesses tokens. `propose` is all that must be written; `begin` and `absorb` are for proposers that have a state."""

    lag: int = 0
    """Hidden states that must be handed in again next round, besides the fresh ones."""

    def begin(self, call: Call, cache: KVCacheManager | None) -> None:
        """A call of `generate` begins. cache: an empty manager for the proposer's own keys and values, if it has a head."""
        return

    def absorb(self, text: Text, fresh: Fresh) -> None:
        """Part of the prompt went through the target: learn from its hidden states. All but the last lag + 1 are final."""
        return

    def listening(self) -> AbstractContextManager[None]:
        """Around a round: a proposer whose hooks follow a model registers them here, for a compiled round cannot."""
        return nullcontext()

    @abstractmethod
    def propose(self, state: DecodeState, num_speculative_tokens: int, noise: Noise) -> Draft:
        """Exactly num_speculative_tokens tokens for every row. Reads `state`; may write past its own cache's lengths.

        A token that was drawn comes with the law that it was drawn from; one that was chosen comes with probs None.
        """


class NoDraft(Proposer):
    """Proposes nothing: with K = 0 a round is one plain decoding step."""

    def propose(self, state: DecodeState, num_speculative_tokens: int, noise: Noise) -> Draft:
        return Draft(state.text.tokens[:, :0], None)


class NGramProposer(Proposer):
    """Looks the last tokens up in the text so far and proposes what followed them (prompt lookup, Saxena 2023). No head needed.

    text  a b c d a b ?      the last two, a b, stood at the start: proposes c d a ...

    max_ngram, min_ngram  how many of the last tokens must have stood together before; more are better than fewer
    """

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise GenerationError(
                f"NGramProposer(max_ngram={max_ngram}, min_ngram={min_ngram}) was asked for; both must be at least 1, and "
                "min_ngram at most max_ngram."
            )
        self.max_ngram, self.min_ngram = max_ngram, min_ngram

    def propose(self, state: DecodeState, num_speculative_tokens: int, noise: Noise) -> Draft:
        return Draft(self.looked_up(state.text, num_speculative_tokens)[1], None)

    def looked_up(self, text: Text, num_tokens: int) -> tuple[Tensor, Tensor]:
        """-> found (B,) bool, tokens (B, num_tokens); where nothing was found, whatever stands at the end, harmless."""
        start, any_found = text.lengths.clone(), torch.zeros_like(text.lengths, dtype=torch.bool)
        for size in range(self.min_ngram, self.max_ngram + 1):  # the longest match wins, being last
            found, where = _latest_match(text, size)
            start, any_found = torch.where(found, where, start), any_found | found
        steps = torch.arange(num_tokens, device=start.device)
        period = (text.lengths - start).clamp(min=1)[:, None]  # a match that runs into the end of the text repeats itself
        return any_found, text.at(start[:, None] + steps % period)


def _latest_match(text: Text, size: int) -> tuple[Tensor, Tensor]:
    """-> found (B,) bool, the slot (B,) behind the latest earlier place of the last `size` tokens."""
    ends = text.lengths[:, None] - size + torch.arange(size, device=text.tokens.device)
    wanted = text.at(ends.clamp(min=0))
    same = (text.tokens.unfold(1, size, 1) == wanted[:, None]).all(-1)
    slots = torch.arange(same.shape[1], device=same.device)
    valid = same & (slots >= text.starts[:, None]) & (slots + size < text.lengths[:, None])
    return valid.any(-1), torch.where(valid, slots + size, 0).amax(-1)


class MTPProposer(Proposer):
    """Drafts with the target's own MTP head.

    Row j of the head's cache pairs the target's hidden state at j with the token behind it. Every round first absorbs the fresh
    rows and commits them, then drafts past the end; those rows are never committed and simply overwritten by the next round:

        text   a b c d e            hidden states of a b c d, those of c d fresh; e pending
        first  (c,d) (d,e) -> x     absorbs two rows, the last of them proposes x
        then   (z,x) -> y           z: what the head recycles instead of the hidden state of e, which nobody knows yet

    With several layers, depth d sees the token d + 1 places ahead and the output of depth d - 1. Its last d rows rest on drafted
    tokens, so that many rows (`lag`) are handed in again next round instead of being committed. A draft that is longer than the
    head is deep reuses the last layer, or where the family says so goes through all layers again, as a chain of so many depths.
    """

    def __init__(self, head: MTPHead) -> None:
        self.head = head

    def begin(self, call: Call, cache: KVCacheManager | None) -> None:
        assert cache is not None
        self.call, self.cache = call, cache
        self.num_depths = self.head.num_depths(call.max_length)
        self.lag = self.num_depths - 1
        self.choices = Choices(self.head.indexers)

    @contextmanager
    def listening(self) -> Iterator[None]:
        with self.head.listening(), self.choices.listening():
            yield

    def absorb(self, text: Text, fresh: Fresh) -> None:
        window, hidden = self._window(fresh.states.shape[1]), fresh.states
        for depth in range(self.num_depths):
            _, hidden = self._chained(depth, text, self._fed(hidden, fresh), window)
        self.cache.commit((fresh.counts - self.num_depths).clamp(min=0))

    def propose(self, state: DecodeState, num_speculative_tokens: int, noise: Noise) -> Draft:
        """The absorbing pass gives a token per depth; the rest are single steps of the last depth past the end."""
        if not self.choices.is_listening:
            with self.choices.listening():
                return self.propose(state, num_speculative_tokens, noise)
        text, fresh, picks = state.text, state.fresh, []
        window, hidden = self._window(fresh.states.shape[1]), fresh.states
        self.choices.wanted()
        for depth in range(self.num_depths):
            normed, hidden = self._chained(depth, text, self._fed(hidden, fresh), window)
            logits = self.head.logits(last_real(normed, fresh.counts)[:, 0], depth % self.head.num_layers)
            picks.append(self._pick(logits, text, depth, noise))
            text = text.with_draft(picks[-1].tokens, depth)
        choice = self.choices.taken()
        kept = None if choice is None else chosen(choice, window, fresh.counts)
        absorbed = (fresh.counts - self.lag).clamp(min=0)
        self.cache.commit(absorbed)
        hidden, last = last_real(hidden, fresh.counts), self.num_depths - 1
        for step in range(self.num_depths, num_speculative_tokens):
            window = self._window(1, fresh.counts - absorbed + step - self.num_depths)
            window = window if kept is None else narrowed(window, kept)
            normed, hidden = self.head(last, self.head.embed(picks[-1].tokens, last), hidden, window)
            picks.append(self._pick(self.head.logits(normed[:, 0], last), text, step, noise))
            text = text.with_draft(picks[-1].tokens, step)
        return joined(picks[:num_speculative_tokens], state)

    def _window(self, num_tokens: int, offset: Tensor | None = None) -> Window:
        return self.call.prompt.placed(self.cache.window(num_tokens, offset))

    def _fed(self, hidden: Tensor, fresh: Fresh) -> Tensor:
        """What a depth is fed: the output of the one before, or in families that do not chain what the first one is fed."""
        return hidden if self.head.spec.deeper == "chained" else fresh.states

    def _chained(self, depth: int, text: Text, hidden: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """One depth over a window, whose rows see the token depth + 1 places ahead. Every turn of the chain has its own keys."""
        turn, layer = divmod(depth, self.head.num_layers)
        first, slots = turn * self.head.num_layers, window.positions + depth + 1
        if turn:
            window = window._replace(cache=Cache(layers=window.cache.layers[first : first + self.head.num_layers]))
        return self.head(layer, self._embeds(text, slots, layer), hidden, window)  # type: ignore[no-any-return]

    def _embeds(self, text: Text, slots: Tensor, depth: int) -> Tensor:
        return self.call.prompt.embedded(self.head.embed(text.at(slots), depth), slots)

    def _pick(self, logits: Tensor, text: Text, position: int, noise: Noise) -> Draft:
        """logits (B, V_draft) -> one token per row, tokens (B, 1), from the head's law after the user's processors."""
        if self.call.sampler.is_plain:
            return Draft(self.head.token_ids(largest(logits)[..., None]), None)
        return drawn(self.head.full_logits(logits.float()), self.call, text, position, noise)


def drawn(full: Tensor, call: Call, text: Text, position: int, noise: Noise) -> Draft:
    """full (B, V) float32, a guess at draft token `position` -> one token per row, from its law after the user's processors."""
    sampler = call.sampler
    if sampler.is_plain:
        return Draft(largest(full)[..., None], None)
    scores = sampler.scores(full[:, None], text._replace(lengths=text.lengths + position))[:, 0]
    allowed = scores.isfinite().any(-1, keepdim=True)  # processors may forbid all that the head can say: any law is lossless
    scores = torch.where(allowed, scores, full)
    if call.sampling == "greedy" or not sampler.do_sample:
        return Draft(largest(scores)[..., None], None)
    law = sampler.law(scores)
    token = race(law, noise.exponential(text.lengths + position, call.purpose, law.shape[-1]))
    return Draft(token[:, None], law[:, None])


class MixedProposer(MTPProposer):
    """Two drafters: a row whose last tokens stood together before takes what followed them, any other row the head's draft.

        text  a b c d a b c ?     rows that repeat themselves: d a b ...       others: the head's

    What is looked up was chosen, not drawn, so its law is one-hot; both kinds of rows share the shapes of a round.
    """

    def __init__(self, head: MTPHead, lookup: NGramProposer) -> None:
        super().__init__(head)
        self.lookup = lookup

    def propose(self, state: DecodeState, num_speculative_tokens: int, noise: Noise) -> Draft:
        draft = super().propose(state, num_speculative_tokens, noise)
        found, looked_up = self.lookup.looked_up(state.text, num_speculative_tokens)
        tokens = torch.where(found[:, None], looked_up, draft.tokens)
        if draft.probs is None:
            return Draft(tokens, None)
        one_hot = torch.zeros_like(draft.probs).scatter_(-1, tokens[..., None], 1.0)
        return Draft(tokens, torch.where(found[:, None, None], one_hot, draft.probs))


def last_real(states: Tensor, counts: Tensor) -> Tensor:
    """states (B, T, D), counts (B,) -> (B, 1, D), the last real one; in a row that has none, the first."""
    return Fresh(states, counts.clamp(min=1)).last(1).states


def joined(picks: list[Draft], state: DecodeState) -> Draft:
    """One token per row each -> all of them."""
    if not picks:
        return Draft(state.text.tokens[:, :0], None)
    probs = [pick.probs for pick in picks if pick.probs is not None]
    return Draft(torch.cat([pick.tokens for pick in picks], dim=1), torch.cat(probs, dim=1) if probs else None)
