"""What a call did: the histogram of tokens per round, from which every figure of merit is derived."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

PARTS = ("prefill", "propose", "score", "accept", "round", "host")


class Metrics:
    """Counts of one call of `generate`.

    history      per row, the tokens appended by each round: [[3, 1, 4], [2, 2, 2, 1]]; a finished row appends nothing
    drafted      the draft length K of each round
    seconds      wall-clock seconds by part: "prefill", "propose", "score", "accept", "host", and "round": all of a compiled
                 round but the host's. On a GPU these are launch times:
                 nothing is synchronised to take them
    """

    def __init__(self, num_rows: int) -> None:
        self.history: list[list[int]] = [[] for _ in range(num_rows)]
        self.drafted: list[int] = []
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._rounds: list[tuple[int, int, int]] = []  # (row, K, tokens appended), finished rows left out

    def update(self, counts: list[int], num_drafted: int, truncated: list[bool]) -> None:
        """One round: tokens appended per row (0: the row had finished), the K it drafted, and which rows were cut short
        by the end of their text: those say nothing about the tokens behind the cut."""
        self.drafted.append(num_drafted)
        for row, (count, cut) in enumerate(zip(counts, truncated, strict=True)):
            if count:
                self.history[row].append(count)
                self._rounds.append((row, num_drafted, count if not cut else -count))

    @classmethod
    def pooled(cls, calls: Iterable[Metrics]) -> Metrics:
        """Several calls as one: their rows side by side, rounds and seconds added up."""
        pooled = cls(0)
        for call in calls:
            pooled._rounds += [(row + len(pooled.history), k, n) for row, k, n in call._rounds]
            pooled.history += call.history
            pooled.drafted += call.drafted
            pooled.seconds = {part: seconds + call.seconds[part] for part, seconds in pooled.seconds.items()}
        return pooled

    @property
    def num_rounds(self) -> int:
        """Target forwards after the prompt."""
        return len(self.drafted)

    @property
    def num_tokens(self) -> int:
        """Tokens appended, all rows together."""
        return sum(map(sum, self.history))

    @property
    def tau(self) -> float:
        """Mean tokens appended per row and target forward; 1 is plain decoding. nan before the first round."""
        return self.num_tokens / len(self._rounds) if self._rounds else float("nan")

    def acceptance_rate(self) -> list[float]:
        """By draft position: the share of rounds that kept draft token k among those that kept all before it (nan: never got
        there). A round that ended its row counts for the positions before the cut only."""
        depth = max(self.drafted, default=0)
        return [self._rate(position) for position in range(1, depth + 1)]

    def _rate(self, position: int) -> float:
        reached = [(k, n) for _, k, n in self._rounds if k >= position and (n >= position or -n > position)]
        return sum(abs(n) > position for _, n in reached) / len(reached) if reached else float("nan")

    def histogram(self) -> Tensor:
        """(B, K+2) int64: histogram[b, n] rounds in which row b appended n tokens."""
        width = max(self.drafted, default=0) + 2
        rows = [torch.bincount(torch.tensor(row, dtype=torch.long), minlength=width) for row in self.history]
        return torch.stack(rows)

    def __repr__(self) -> str:
        rates = ", ".join(f"{rate:.2f}" for rate in self.acceptance_rate())
        return f"Metrics(tau={self.tau:.2f}, num_tokens={self.num_tokens}, num_rounds={self.num_rounds}, acceptance=[{rates}])"
