"""How many tokens to draft in a round."""

from __future__ import annotations

from abc import ABC, abstractmethod

from .errors import GenerationError
from .metrics import Metrics


class DraftSchedule(ABC):
    """Chooses K before each round, one for the whole batch.

    choices  the finite set of K that it may ask for
    """

    choices: tuple[int, ...]

    @abstractmethod
    def next_length(self, metrics: Metrics) -> int:
        """One of `choices`, from what the call has seen so far."""


class FixedLength(DraftSchedule):
    """The same K every round; 0 is plain decoding."""

    def __init__(self, num_speculative_tokens: int) -> None:
        self.choices = (num_speculative_tokens,)

    def next_length(self, metrics: Metrics) -> int:
        return self.choices[0]


def schedule_for(num_speculative_tokens: object) -> DraftSchedule:
    """An int K >= 0 or a DraftSchedule of the user's. Raises GenerationError for anything else."""
    if isinstance(num_speculative_tokens, DraftSchedule):
        return num_speculative_tokens
    if isinstance(num_speculative_tokens, bool) or not isinstance(num_speculative_tokens, int) or num_speculative_tokens < 0:
        raise GenerationError(
            f"num_speculative_tokens={num_speculative_tokens!r} was asked for; it must be an int of at least 0 "
            "(0: plain decoding; 1: a good start), or a DraftSchedule."
        )
    return FixedLength(num_speculative_tokens)
