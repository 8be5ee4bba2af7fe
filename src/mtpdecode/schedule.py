"""How many tokens to draft in a round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from operator import mul
from random import Random
from statistics import NormalDist, median_low
from typing import NamedTuple

from .errors import GenerationError
from .metrics import Metrics


class Seen(NamedTuple):
    """What a round was like, on the host.

    num_drafted  its K                     counts  per row, the tokens appended; 0 where the row had finished
    cut          per row, whether its text ended in this round: then its count says nothing about the tokens behind the end
    seconds      what the round took       num_tokens  the longest row, prompt included
    learning     seconds ahead of the round in which the head learnt what it had missed, above all the prompt
    """

    num_drafted: int
    counts: list[int]
    cut: list[bool]
    seconds: float
    num_tokens: int
    learning: float = 0.0


class DraftSchedule(ABC):
    """Chooses K before each round, one for the whole batch.

    choices  the finite set of K that it may ask for
    """

    choices: tuple[int, ...]

    @abstractmethod
    def next_length(self, metrics: Metrics) -> int:
        """One of `choices`, from what the call has seen so far."""

    def begin(self, num_rows: int, num_tokens: int) -> None:
        """A call begins, with so many rows, the longest of so many tokens."""
        return

    def observe(self, seen: Seen) -> None:
        """A round is over."""
        return

    def time(self, num_speculative_tokens: int, num_rows: int, num_tokens: int, seconds: float) -> None:
        """What a round of a trial took, whose text says nothing about acceptance."""
        return


class FixedLength(DraftSchedule):
    """The same K every round; 0 is plain decoding."""

    def __init__(self, num_speculative_tokens: int) -> None:
        self.choices = (num_speculative_tokens,)

    def next_length(self, metrics: Metrics) -> int:
        return self.choices[0]


class Trial(DraftSchedule):
    """Every K in one call, again and again in another order, and what its rounds took.

        choices 0 1 2      rounds  2 0 1 | 1 2 0 | 2 2 1 0 | 1 1 0 2 ...
                           count   - - -   x x x   - x x x   - x x x

    The first round of a K does not count, for it may have been compiled; nor does one behind a round with K = 0, which teaches
    the head what it missed: both come once more.

    lengths  K of every round        seconds  K -> what those that count took
    """

    def __init__(self, choices: Sequence[int], num_rounds: int) -> None:
        self.choices = tuple(choices)
        plan = list(_tried(self.choices, num_rounds))
        self.lengths = [k for k, _ in plan]
        self.seconds: dict[int, list[float]] = {k: [] for k in self.choices}
        self._next, self._counting = iter(self.lengths), iter([counts for _, counts in plan])

    def next_length(self, metrics: Metrics) -> int:
        return next(self._next, self.choices[0])

    def observe(self, seen: Seen) -> None:
        if next(self._counting, False):
            self.seconds[seen.num_drafted].append(seen.seconds)


def _tried(choices: Sequence[int], num_rounds: int) -> Iterator[tuple[int, bool]]:
    """(K, whether it counts): every K once, then num_rounds times."""
    chance, before = Random(0), 0
    for number in range(num_rounds + 1):
        for k in chance.sample(choices, len(choices)):
            if number and k and not before:
                yield k, False
            yield k, number > 0
            before = k


class Place(NamedTuple):
    """What costs are compared at: the number of rows, and the longest text's length in binary digits."""

    num_rows: int
    length: int

    def __str__(self) -> str:
        rows = f"{self.num_rows} row{'s' if self.num_rows > 1 else ''}"
        return f"{rows}, texts of {2**self.length // 2} to {2**self.length - 1} tokens"


def _place(num_rows: int, num_tokens: int) -> Place:
    return Place(num_rows, num_tokens.bit_length())


class Outlook(NamedTuple):
    """What a schedule expects of one K: tokens and seconds a round, and what it has measured (nan: nothing yet).

    rounds  how many of this K it has seen in calls with as many rows and about as long texts
    """

    num_speculative_tokens: int
    tokens: float
    seconds: float
    measured_tokens: float
    measured_seconds: float
    rounds: int

    @property
    def rate(self) -> float:
        """Tokens a second and row."""
        return self.tokens / self.seconds


class ExpectedSpeedup(DraftSchedule):
    """Measures, and drafts as many tokens as promise most tokens a second; none where that is plain decoding.

        tokens of K   E(K) = 1 + p a_1 + ... + p^K a_1 ... a_K    a_k: how often token k is kept once those before it are
        seconds of K  C(K), the median of the last rounds with as many rows and about as long texts
        chosen        the K with the largest E(K) / C(K)

    (Leviathan et al. 2023, section 3, with a rate per position and measured costs.) A batch goes on until its slowest row ends,
    so that row's pace p counts: how often it keeps a draft token, over how often all rows do; 1 for a single row. See `_Race`.

    It changes K for a gain of `margin` at least, and tries plain decoding and neighbours of the best K while what that costs, all
    told, is below `budget` of the time.

    Costs are noisy, and a slow second must not make drafts seem free: a longer K is taken to cost no less than a shorter one, and
    drafts must promise `caution` more than plain decoding.

    choices  the K it may take, 0 among them; each is a graph of its own where rounds are compiled
    start    the K to begin with
    margin, caution, budget  shares          memory    rounds after which an observation counts for a third
    """

    def __init__(
        self,
        choices: Iterable[int] = (0, 1, 2, 3, 4, 5),
        start: int = 1,
        *,
        margin: float = 0.02,
        caution: float = 0.05,
        budget: float = 0.01,
        memory: float = 40.0,
    ) -> None:
        self.choices = tuple(sorted(set(choices)))
        longest = max(self.choices, default=0)
        if start not in self.choices or min(self.choices) or not longest:
            raise GenerationError(
                f"ExpectedSpeedup(choices={tuple(choices)}, start={start}) was asked for; choices must hold 0 (plain decoding), "
                "a larger K and start, as (0, 1, 3) with start=1."
            )
        self.start, self.margin, self.caution, self.budget, self.forgetting = start, margin, caution, budget, 1 - 1 / memory
        self._tried, self._kept = [0.0] * longest, [0.0] * longest
        self._costs: dict[Place, dict[int, deque[float]]] = defaultdict(dict)
        self._tokens: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=64))
        self._place, self._current = Place(1, 0), start
        self._paces: dict[int, float] = {}
        self._race = _Race(1, 1.0)
        self._seconds, self._spent, self._learning, self._age = 0.0, 0.0, 0.0, dict.fromkeys(self.choices, 0)

    def begin(self, num_rows: int, num_tokens: int) -> None:
        self._place = _place(num_rows, num_tokens)
        self._race = _Race(num_rows, self._pace(num_rows))

    def observe(self, seen: Seen) -> None:
        rows = [(count, cut) for count, cut in zip(seen.counts, seen.cut, strict=True) if count]
        if not rows:
            return
        if seen.num_drafted and len(seen.counts) > 1:
            self._paces[len(seen.counts)] = self._race.pace(seen, self._rate(1))
        self._learn(seen.num_drafted, rows)
        appended = sum(count for count, _ in rows) / len(rows)
        self.time(seen.num_drafted, len(seen.counts), seen.num_tokens, seen.seconds)
        self._place = _place(len(seen.counts), seen.num_tokens)
        self._tokens[seen.num_drafted].append(appended)
        self._age = {k: age + 1 for k, age in self._age.items()} | {seen.num_drafted: 0}
        usual = min(seen.seconds, 2 * _cost(seen.num_drafted, self._known()))  # a round that was compiled took a minute, once
        self._seconds += usual + seen.learning
        if seen.num_drafted != self._current:
            best = max(each.rate for each in self.outlook())
            won = 1 + self._pace(len(seen.counts)) * (appended - 1)
            self._spent += max(usual - won / best, 0.0) + seen.learning
            self._learning = seen.learning

    def time(self, num_speculative_tokens: int, num_rows: int, num_tokens: int, seconds: float) -> None:
        costs = self._costs[_place(num_rows, num_tokens)]
        costs.setdefault(num_speculative_tokens, deque(maxlen=9)).append(seconds)

    def next_length(self, metrics: Metrics) -> int:
        for k in (self.start, 0):
            if len(self._measured(k)) < 2:
                return k
        outlook = {each.num_speculative_tokens: each for each in self.outlook()}
        best = max(outlook.values(), key=lambda each: each.rate)
        if best.rate < (1 + self.caution) * outlook[0].rate:
            self._current = 0
        elif best.rate > (1 + self.margin) * outlook[self._current].rate:
            self._current = best.num_speculative_tokens
        return self._explored(outlook)

    def outlook(self, place: Place | None = None) -> list[Outlook]:
        """What each K promises at a place: with as many rows, and about as long texts. None: where the last round was."""
        found, chances, known = [], self._chances(), self._known(place)
        pace = self._pace((place or self._place).num_rows)
        for k in self.choices:
            tokens, counts = sum(pace**at * chance for at, chance in enumerate(chances[: k + 1])), self._tokens[k]
            measured = sum(counts) / len(counts) if counts else float("nan"), known.get(k, float("nan"))
            found.append(Outlook(k, tokens, _cost(k, known), *measured, len(self._measured(k, place))))
        return found

    def __str__(self) -> str:
        """A table of the outlook for each number of rows and length of text that were seen, the best K marked."""
        return "\n\n".join(f"{place}\n{self._table(place)}" for place in sorted(self._costs) or [self._place])

    def _table(self, place: Place) -> str:
        head = f"{'K':>4}{'tokens/round':>14}{'measured':>10}{'ms/round':>10}{'measured':>10}{'rounds':>8}{'tokens/s':>10}"
        rows = self.outlook(place)
        best = max(rows, key=lambda each: each.rate)
        lines = [
            f"{'>' if each is best else ' '}{each.num_speculative_tokens:>3}{each.tokens:>14.2f}{each.measured_tokens:>10.2f}"
            f"{1e3 * each.seconds:>10.1f}{1e3 * each.measured_seconds:>10.1f}{each.rounds:>8}{each.rate:>10.1f}"
            for each in rows
        ]
        return "\n".join([head, *lines])

    def _learn(self, num_drafted: int, rows: Sequence[tuple[int, bool]]) -> None:
        """(count, cut): a row kept count - 1 draft tokens and, unless its text was cut, refused the next."""
        for position in range(num_drafted):
            tries = [position < count - 1 for count, cut in rows if position < count - cut]
            if tries:
                self._tried[position] = self._tried[position] * self.forgetting + len(tries)
                self._kept[position] = self._kept[position] * self.forgetting + sum(tries)

    def _chances(self) -> list[float]:
        """1, a_1, a_1 a_2, ..."""
        return list(accumulate(map(self._rate, range(1, self.choices[-1] + 1)), mul, initial=1.0))

    def _pace(self, num_rows: int) -> float:
        """Of the slowest of so many rows."""
        return self._paces.get(num_rows) or usual_pace(num_rows)

    def _rate(self, k: int) -> float:
        """a_k: of a position that was hardly tried, about what the one before it has."""
        believed, weight = (0.5, 1) if k == 1 else (self._rate(k - 1), 3)
        return (self._kept[k - 1] + weight * believed) / (self._tried[k - 1] + weight)

    def _measured(self, k: int, place: Place | None = None) -> deque[float]:
        """Seconds of the last rounds with this K and as many rows as now, of texts about as long if there were any."""
        rows, length = place or self._place
        places = [place for place, costs in self._costs.items() if place.num_rows == rows and k in costs]
        nearest = min(places, key=lambda place: abs(place.length - length), default=None)
        return self._costs[nearest][k] if nearest else deque()

    def _known(self, place: Place | None = None) -> dict[int, float]:
        """K -> seconds of a round, where they were measured."""
        return {k: median_low(costs) for k in self.choices if (costs := self._measured(k, place))}

    def _explored(self, outlook: dict[int, Outlook]) -> int:
        """The current K, or a neighbour or 0, if never tried or not for long, as far as the budget goes."""
        here = outlook[self._current]
        due = {k for k, each in outlook.items() if self._age[k] >= EXPLORE_EVERY or not each.rounds}
        here_at = self.choices.index(self._current)
        near = [k for k in {0, *self.choices[max(here_at - 1, 0) : here_at + 2]} if k in due and k != self._current]
        if not near:
            return self._current
        tried = max(near, key=lambda k: self._age[k])
        loss = max(outlook[tried].seconds - outlook[tried].tokens / here.rate, 0.0) + (0.0 if self._current else self._learning)
        return tried if self._spent + loss <= self.budget * self._seconds else self._current


class _Race:
    """The rows of a call, and how often each has kept the first token of a draft, beside how often that was expected.

    pace  to begin with; it weighs as much as `WEIGHT` tokens that were expected to be kept
    """

    WEIGHT = 32.0

    def __init__(self, num_rows: int, pace: float) -> None:
        self._kept, self._expected = [pace * self.WEIGHT] * num_rows, [self.WEIGHT] * num_rows

    def pace(self, seen: Seen, rate: float) -> float:
        """kept / expected of the row that lags most, of those that go on; of all, where none does.

        rate  how often rows keep the first token
        """
        going_on = [row for row, (count, cut) in enumerate(zip(seen.counts, seen.cut, strict=True)) if count and not cut]
        for row in going_on:
            self._kept[row] += seen.counts[row] > 1
            self._expected[row] += rate
        return min(self._kept[row] / self._expected[row] for row in going_on or range(len(seen.counts)))


def usual_pace(num_rows: int) -> float:
    """How often the slowest of some rows keeps a draft token, over how often they all do, before any of them was seen.

    1 - SPREAD m(B)      m(B): the largest of B standard normal numbers, about (Blom 1958: the (B - 3/8) / (B + 1/4) quantile)
    """
    return max(1 - SPREAD * NormalDist().inv_cdf((num_rows - 0.375) / (num_rows + 0.25)), 0.0)


SPREAD = 0.26
"""Standard deviation of how often texts keep the first draft token, over its mean: 0.26 in `benchmarks/results/decode.json`."""


def _cost(k: int, known: dict[int, float]) -> float:
    """Seconds of a round: measured, or on the line through the two nearest K that are; no less than those of a shorter K."""
    if not known:
        return 1.0
    least = max((seconds for each, seconds in known.items() if each <= k), default=0.0)
    near = sorted(known, key=lambda each: abs(each - k))[:2]
    if k in known or len(near) == 1:
        return max(known[near[0]], least)
    slope = (known[near[1]] - known[near[0]]) / (near[1] - near[0])
    return max(known[near[0]] + slope * (k - near[0]), least)


EXPLORE_EVERY = 16
"""Rounds between two tries of the same K."""


def schedule_for(num_speculative_tokens: object, start: int = 1) -> DraftSchedule:
    """An int K >= 0, "auto", or a DraftSchedule of the user's. Raises GenerationError for anything else.

    start  where "auto" begins
    """
    if isinstance(num_speculative_tokens, DraftSchedule):
        return num_speculative_tokens
    if num_speculative_tokens == "auto":
        return ExpectedSpeedup({0, 1, max(start, 1), max(start, 1) + 2}, start)
    if isinstance(num_speculative_tokens, bool) or not isinstance(num_speculative_tokens, int) or num_speculative_tokens < 0:
        raise GenerationError(
            f"num_speculative_tokens={num_speculative_tokens!r} was asked for; it must be an int of at least 0 "
            "(0: plain decoding; 1: a good start), 'auto', or a DraftSchedule."
        )
    return FixedLength(num_speculative_tokens)
