"""Where a row's text ends: at the first token at which plain decoding would have ended it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteria

from .state import DecodeState, Text, Verdict


class Stopping(NamedTuple):
    """When rows end.

    eos_ids      (n,) int64        any of them ends a row
    max_lengths  (B,) int64        tokens that a row may hold, prompt included
    criteria     whatever else the user asked for; asked prefix by prefix, row by row, as plain decoding would
    """

    eos_ids: Tensor
    max_lengths: Tensor
    criteria: Sequence[StoppingCriteria] = ()

    def truncate(self, verdict: Verdict, state: DecodeState) -> tuple[Verdict, Tensor]:
        """-> the verdict cut where its rows end, and done (B,) bool."""
        verdict, done = truncate(verdict, state, self.eos_ids, self.max_lengths)
        return self._ask(verdict, state.text, done) if self.criteria else (verdict, done)

    def _ask(self, verdict: Verdict, text: Text, done: Tensor) -> tuple[Verdict, Tensor]:
        text = text.with_draft(verdict.tokens)
        kept = [self._first_stop(text, row, count) for row, count in enumerate(verdict.counts.tolist())]
        counts = torch.tensor([count for count, _ in kept], device=done.device)
        stopped = torch.tensor([stop for _, stop in kept], device=done.device)
        return Verdict(verdict.tokens, counts), done | stopped

    def _first_stop(self, text: Text, row: int, count: int) -> tuple[int, bool]:
        for num_tokens in range(1, count + 1):
            prefix = text.prefix(row, num_tokens)
            if any(bool(torch.as_tensor(criterion(prefix, None)).any()) for criterion in self.criteria):
                return num_tokens, True
        return count, False


def truncate(verdict: Verdict, state: DecodeState, eos_ids: Tensor, max_lengths: Tensor) -> tuple[Verdict, Tensor]:
    """Cut each row after its first end token or at its length budget. -> verdict, done (B,) bool.

    tokens  b c E d      counts 4      E ends a row      ->  counts 3, done
    a row that was done before                           ->  counts 0, done
    """
    steps = torch.arange(1, verdict.tokens.shape[1] + 1, device=verdict.tokens.device)
    ends = (verdict.tokens[..., None] == eos_ids).any(-1)  # isin sorts where there are many, and waits for the device
    until_end = torch.where(ends, steps, steps.numel() + 1).amin(-1)
    counts = torch.minimum(torch.minimum(verdict.counts, until_end), max_lengths - state.text.lengths)
    counts = torch.where(state.done, 0, counts)
    done = state.done | (until_end <= counts) | (state.text.lengths + counts >= max_lengths)
    return Verdict(verdict.tokens, counts), done
