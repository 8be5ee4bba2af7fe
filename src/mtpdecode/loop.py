"""One decode round, and the loop around it: what everything else exists for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .acceptance import ACCEPTANCE, Acceptance, accept, accept_matches
from .cache import KVCacheManager
from .errors import GenerationError
from .metrics import Metrics
from .proposer import NoDraft, Proposer
from .sampling import Sampler
from .schedule import DraftSchedule, Seen
from .state import DecodeState, Draft, Fresh, Noise, Prompt, Purpose, Text, Verdict
from .stopping import Stopping
from .verifier import Verifier

NOBODY = NoDraft()
"""Who drafts in rounds with K = 0."""


class Roles(NamedTuple):
    """Who does what in a call. rule: None compares the draft with the target's own draws.

    width  the widest window W: the largest K, and the pending token
    late   how many rounds are begun before the host reads what an earlier one appended: 1 where a device works beside the host,
           so that neither waits for the other
    """

    proposer: Proposer
    verifier: Verifier
    sampler: Sampler
    rule: Acceptance | None
    stopping: Stopping
    schedule: DraftSchedule
    caches: tuple[KVCacheManager, ...]
    width: int
    late: int = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Around rounds: hooks of ours follow target and head in here, and outside of graphs; a stream that waits leaves none."""
        with self.verifier.listening(), self.proposer.listening():
            yield

    def reserve(self, num_tokens: int, width: int) -> None:
        """Slots for a round of rows that hold at most num_tokens: a window of this width, and what the head drafts past it."""
        for cache in self.caches:
            cache.reserve(num_tokens + 2 * width + self.proposer.lag)


class Round(NamedTuple):
    """What a round appended, on the host: per row its new tokens (none where the row had finished), and which rows are done."""

    tokens: list[list[int]]
    done: list[bool]


def decode_round(
    state: DecodeState, roles: Roles, num_speculative_tokens: int, noise: Noise, clock: Clock
) -> tuple[DecodeState, Tensor]:
    """Propose, score, accept, stop, commit. The state moves on; nothing moves back. -> state, what is told of it (`Verdict.told`)

    With K = 0 the head is not asked, and the state's fresh rows are those of this round alone: see `Rest`.
    """
    noise = noise.of_round(state.text.lengths)
    proposer = roles.proposer if num_speculative_tokens else NOBODY
    draft = proposer.propose(state, num_speculative_tokens, noise)
    clock.lap("propose")
    scores, hidden = roles.verifier.score(state, draft)
    clock.lap("score")
    verdict = judge(draft, scores, roles.sampler, roles.rule, noise, state.text.lengths)
    verdict, done = roles.stopping.truncate(verdict, state)
    roles.verifier.cache.commit(verdict.counts)
    fresh = Fresh(hidden, verdict.counts)
    if num_speculative_tokens:
        lag = roles.proposer.lag
        fresh = state.fresh.last(lag).extended(hidden, verdict.counts, num_speculative_tokens + 1 + lag)
    clock.lap("accept")
    return state.appended(verdict, fresh, done), verdict.told(done)


Step = Callable[[DecodeState, Roles, int, Noise, "Clock"], tuple[DecodeState, Tensor]]


class Rest:
    """What the target thought and the head has not learnt: the prompt, and rounds with K = 0.

    The head learns it when it is to draft, or when it has become much. So a plain round costs no more than plain decoding, a text
    for which no draft is worth its time no more than a plain text, and no row of the head's is ever missing. Between rounds of
    different K it learns what the next one, which may be shorter, would not take in.

    fresh  what the head was given last and wants to be handed in again
    """

    MOST = 1024

    def __init__(self, fresh: Fresh) -> None:
        self._fresh, self._last = fresh, 0
        self._prompt: list[Fresh] = []
        self._rounds: list[Fresh] = []

    def read(self, fresh: Fresh) -> None:
        """A piece of the prompt was read."""
        self._prompt.append(fresh)

    def is_due(self, num_speculative_tokens: int) -> bool:
        """Whether the head learns ahead of a round with this K."""
        return num_speculative_tokens != self._last if num_speculative_tokens else len(self._rounds) > self.MOST

    def before(self, state: DecodeState, roles: Roles, num_speculative_tokens: int) -> DecodeState:
        """The state as a round with this K wants it."""
        if self._last and self._last != num_speculative_tokens:
            self._fresh = state.fresh
        if not self.is_due(num_speculative_tokens):
            return state
        width = num_speculative_tokens + 1 + roles.proposer.lag
        self._fresh = self._caught_up(self._fresh, state.text, roles, width)
        return state._replace(fresh=self._fresh)

    def after(self, state: DecodeState, num_speculative_tokens: int) -> None:
        """A round is over."""
        self._last = num_speculative_tokens
        if not num_speculative_tokens:
            self._rounds.append(state.fresh)

    def _caught_up(self, fresh: Fresh, text: Text, roles: Roles, width: int) -> Fresh:
        """The head absorbs all of it but what it wants to be handed in again. -> that, with room for `width`."""
        keep = roles.proposer.lag + 1
        for piece in (*self._prompt, *_joined(self._rounds)):
            fresh = _absorbed(fresh.extended(*piece, fresh.states.shape[1] + piece.states.shape[1]), text, roles, keep)
        if fresh.states.shape[1] > width:
            fresh = _absorbed(fresh, text, roles, keep)
        self._prompt, self._rounds = [], []
        nothing = Fresh(torch.zeros_like(fresh.states[:, :1]), torch.zeros_like(fresh.counts))  # all there is after one token
        return fresh.extended(*nothing, width)


def _absorbed(fresh: Fresh, text: Text, roles: Roles, keep: int) -> Fresh:
    """The head has read it; what it wants to see again."""
    roles.proposer.absorb(text, fresh)
    return fresh.last(keep)


def _joined(rounds: Sequence[Fresh]) -> list[Fresh]:
    """Those of rounds that appended a token each, as one; none: none. A row that had finished has no more."""
    if not rounds:
        return []
    return [Fresh(torch.cat([fresh.states for fresh in rounds], dim=1), torch.stack([fresh.counts for fresh in rounds]).sum(0))]


def judge(draft: Draft, scores: Tensor, sampler: Sampler, rule: Acceptance | None, noise: Noise, positions: Tensor) -> Verdict:
    """scores (B, K+1, V) -> which tokens are appended. For argmax every lossless rule is the same comparison."""
    if rule is None or (not sampler.do_sample and rule in ACCEPTANCE.values()):
        return accept_matches(draft, sampler.draws(scores, noise, positions, Purpose.TARGET))
    return accept(rule, draft, sampler.law(scores), noise, positions)


def prefill(prompt: Prompt, text: Text, roles: Roles, chunk_size: int, hidden_size: int) -> tuple[DecodeState, Rest]:
    """Everything but the prompt's last token goes through the target, in chunks; the last one is the first pending token.

        prompt   a b c d      cache  a b c      pending  d      rest  the hidden states of a b c

    So the first round drafts already, and is like every other. After a one-token prompt the head guesses blindly.
    """
    keep, remaining = roles.proposer.lag + 1, int(prompt.lengths.max()) - 1
    nothing = torch.zeros_like(text.lengths)
    states = torch.zeros(len(nothing), keep, hidden_size, dtype=roles.verifier.target.dtype, device=nothing.device)
    fresh = Fresh(states, nothing)
    rest, chunk_size = Rest(fresh), max(remaining, 1) if prompt.is_whole else chunk_size
    for start in range(0, remaining, chunk_size):
        size = min(chunk_size, remaining - start)
        counts = (prompt.lengths - 1 - start).clamp(0, size)
        rest.read(Fresh(roles.verifier.read(start, size, counts), counts))
    return DecodeState(text, fresh, nothing.bool()), rest


def decode(
    prompt: Prompt,
    text: Text,
    roles: Roles,
    noise: Noise,
    metrics: Metrics,
    chunk_size: int,
    hidden_size: int,
    step: Step = decode_round,
) -> Iterator[Round]:
    """Prefill, then rounds until every row is done; one host read a round, of the round before where the device works on.

        late 0   round 1, read 1, round 2, read 2          late 1   round 1, round 2, read 1, round 3, read 2

    What was begun when the last row had ended, unknown to the host, appends nothing and is not read.

    step  what makes a round: `decode_round`, or the same compiled
    """
    clock, lengths = Clock(metrics.seconds), prompt.lengths.tolist()
    roles.reserve(max(lengths), 1)
    text = text._replace(tokens=text.tokens.clone())  # of this call alone: rounds write into it
    (state, rest), done = prefill(prompt, text, roles, chunk_size, hidden_size), [False] * len(lengths)
    clock.lap("prefill")
    roles.schedule.begin(len(lengths), max(lengths))
    unread: deque[Report] = deque()
    read_at = time.perf_counter()
    while not all(done):
        asked, num_drafted = time.perf_counter(), _next_length(roles.schedule, metrics)
        unknown = sum(report.num_drafted + 1 for report in unread)  # tokens that may have been appended since
        roles.reserve(max(lengths) + unknown, roles.width if rest.is_due(num_drafted) else num_drafted + 1)
        state = rest.before(state, roles, num_drafted)
        clock.lap("propose")
        begun = time.perf_counter()
        state, told = step(state, roles, num_drafted, noise, clock)
        rest.after(state, num_drafted)
        unread.append(Report(told, num_drafted, asked, begun))
        if len(unread) <= roles.late:
            continue
        report = unread.popleft()
        counts, done, tokens = report.read()
        begun, read_at = max(report.begun, read_at), time.perf_counter()
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        metrics.update(counts, report.num_drafted, done)
        seconds, learning = read_at - begun, report.begun - report.asked
        roles.schedule.observe(Seen(report.num_drafted, counts, done, seconds, max(lengths), learning))
        clock.lap("host")
        yield Round([row[:count] for row, count in zip(tokens, counts, strict=True)], done)
        clock.skip()


class Report:
    """What is told of a round (`Verdict.told`), on its way to the host: one copy, begun at once and awaited when it is read."""

    def __init__(self, told: Tensor, num_drafted: int, asked: float, begun: float) -> None:
        self.num_drafted, self.asked, self.begun = num_drafted, asked, begun
        self._rows = told.to("cpu", non_blocking=True)
        self._arrival = torch.cuda.Event() if told.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrival:
            self._arrival.record()

    def read(self) -> tuple[list[int], list[bool], list[list[int]]]:
        """-> per row: how many tokens, whether it is done, the tokens with padding behind."""
        if self._arrival:
            self._arrival.synchronize()
        rows: list[list[int]] = self._rows.tolist()
        return [row[0] for row in rows], [bool(row[1]) for row in rows], [row[2:] for row in rows]


def _next_length(schedule: DraftSchedule, metrics: Metrics) -> int:
    length = schedule.next_length(metrics)
    if length not in schedule.choices:
        raise GenerationError(
            f"{type(schedule).__name__} asked for K={length!r}; its choices are {schedule.choices}, and room is made for these. "
            "Name every K in choices."
        )
    return length


class Clock:
    """Adds the time between laps to named parts."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.skip()

    def skip(self) -> None:
        """What passed since the last lap belongs to nobody here."""
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """What passed since the last lap belongs to this part."""
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now
