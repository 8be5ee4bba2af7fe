"""From logits to laws: the target's and the draft's logits pass through the same processors, each with its true prefix."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation import logits_process as hf

from .errors import GenerationError
from .state import Noise, Text

PREFIX_FREE = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
    hf.SuppressTokensLogitsProcessor,
)
"""Processors that do not look at the text: they take all rows and positions of a window in one call."""

LENGTHS = {
    hf.MinLengthLogitsProcessor: "min_length",
    hf.MinNewTokensLengthLogitsProcessor: "prompt_length_to_skip",
    hf.ForcedEOSTokenLogitsProcessor: "max_length",
    hf.ExponentialDecayLengthPenalty: "regulation_start",
    hf.SuppressTokensAtBeginLogitsProcessor: "begin_index",
    hf.RepetitionPenaltyLogitsProcessor: "prompt_ignore_length",
}
"""Processors that count tokens from the start of the padded prompt, and where they keep the number: a row that is shorter
than the batch gets a copy with the number that it would have alone."""

REFUSED = (
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    hf.ClassifierFreeGuidanceLogitsProcessor,
    hf.EncoderRepetitionPenaltyLogitsProcessor,
    hf.EncoderNoRepeatNGramLogitsProcessor,
    hf.SynthIDTextWatermarkLogitsProcessor,
)
"""Processors that keep a state of their own from call to call, or the whole batch's prompt: not exact on drafted positions."""


class Sampler:
    """Turns logits into the law of the next token, and the law into tokens.

    processors   as `model.generate` prepares them, the user's own included
    padding      per row, how many pad tokens its prompt has in the batch
    do_sample    False: the law is one-hot on the largest score
    device       where logits will lie
    """

    def __init__(
        self,
        processors: Sequence[LogitsProcessor],
        do_sample: bool,
        padding: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        for processor in processors:
            if isinstance(processor, REFUSED):
                raise GenerationError(
                    f"{type(processor).__name__} was asked for; it keeps a state between calls, so drafted positions cannot be "
                    "processed exactly. Leave its option out, or call model.generate() without mtpdecode."
                )
        self.do_sample = do_sample
        self.asks_row_by_row = any(type(each) not in (*PREFIX_FREE, *TOGETHER) for each in processors)
        self._steps = [_step(processor, padding, torch.device(device)) for processor in processors]

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the largest logit decides: no processors, no sampling."""
        return not (self.do_sample or self._steps)

    def scores(self, logits: Tensor, text: Text) -> Tensor:
        """logits (B, T, V) -> processed scores (B, T, V) float32.

        Position t of row b stands behind text.tokens[b, : text.lengths[b] + t].
        """
        scores = logits.to(torch.float32)
        for step in self._steps:
            scores = step(scores, text)
        return scores

    def law(self, scores: Tensor) -> Tensor:
        """scores (..., V) -> probabilities (..., V) float32; one-hot without sampling."""
        if self.do_sample:
            return scores.softmax(-1)
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)

    def draws(self, scores: Tensor, noise: Noise, positions: Tensor, purpose: int) -> Tensor:
        """scores (B, T, V), positions (B,) of the first of T -> tokens (B, T) int64, one draw from the law of each."""
        if not self.do_sample:
            return largest(scores)
        rows = enumerate(scores.unbind(1))
        draws = [race(row.softmax(-1), noise.exponential(positions + k, purpose, scores.shape[-1])) for k, row in rows]
        return torch.stack(draws, dim=1)


def largest(scores: Tensor) -> Tensor:
    """scores (..., V) -> (...) int64, `argmax`: of equal ones the first, and NaN is larger than any.

    In graphs for a CPU in two passes, the largest and where it is, which vectorise: half of the time for 4 times 49152 scores.
    """
    if scores.device.type != "cpu" or not torch.compiler.is_compiling():
        return scores.argmax(-1)
    slots = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
    is_largest = (scores >= scores.amax(-1, keepdim=True)) | (scores != scores)  # `isnan` takes longer
    return torch.where(is_largest, slots, scores.shape[-1]).amin(-1).long()


def race(weights: Tensor, exponentials: Tensor) -> Tensor:
    """weights (B, V) >= 0 of any sum, exponentials (B, V) ~ Exp(1) -> (B,) int64 drawn in proportion to the weights.

    The first of independent Poisson clocks to ring: no sum, no synchronisation.
    """
    return (weights / exponentials).argmax(-1)


Step = Callable[[Tensor, Text], Tensor]
"""scores (B, T, V) and the text before them -> scores (B, T, V)."""


def _step(processor: LogitsProcessor, padding: Sequence[int], device: torch.device) -> Step:
    if type(processor) in PREFIX_FREE:
        return partial(_all_at_once, processor)
    rows = [_for_row(processor, row, pad) for row, pad in enumerate(padding)]
    together = TOGETHER.get(type(processor))
    return together(rows, device) if together else partial(_one_by_one, rows)


class _LeastLength:
    """No end before a text has so many tokens: `MinLengthLogitsProcessor` and `MinNewTokensLengthLogitsProcessor`, rows together.

    least  (B,) int64        ends  (n,) int64, any of which may lie outside of the vocabulary
    """

    def __init__(self, rows: Sequence[LogitsProcessor], device: torch.device) -> None:
        least: list[Any] = list(rows)
        self.least = torch.tensor([_least_length(row) for row in least], device=device)
        self.ends = least[0].eos_token_id.to(device).reshape(-1, 1)

    def __call__(self, scores: Tensor, text: Text) -> Tensor:
        num_tokens = (text.lengths - text.starts)[:, None] + torch.arange(scores.shape[1], device=scores.device)
        is_end = (torch.arange(scores.shape[2], device=scores.device) == self.ends).any(0)
        return scores.masked_fill((num_tokens < self.least[:, None])[..., None] & is_end, float("-inf"))


def _least_length(processor: Any) -> int:
    if isinstance(processor, hf.MinLengthLogitsProcessor):
        return int(processor.min_length)
    return int(processor.prompt_length_to_skip + processor.min_new_tokens)


class _Repeated:
    """`RepetitionPenaltyLogitsProcessor` (Keskar et al. 2019, section 4.1), rows together.

    ignored  (B,) int64, how many tokens at the start of each row do not count
    """

    def __init__(self, rows: Sequence[LogitsProcessor], device: torch.device) -> None:
        penalties: list[Any] = list(rows)
        self.penalty: float = penalties[0].penalty
        self.ignored = torch.tensor([max(row.prompt_ignore_length or 0, 0) for row in penalties], device=device)

    def __call__(self, scores: Tensor, text: Text) -> Tensor:
        num_tokens, size = scores.shape[1:]
        slots = torch.arange(text.tokens.shape[1], device=scores.device)
        ends = text.lengths[:, None] + torch.arange(num_tokens, device=scores.device)
        is_before = (slots >= (text.starts + self.ignored)[:, None, None]) & (slots < ends[..., None])  # (B, T, S)
        ids = torch.where(is_before, text.tokens.clamp(max=size)[:, None], size)  # what is no token of the vocabulary is number V
        seen = torch.zeros(*scores.shape[:2], size + 1, dtype=torch.bool, device=scores.device).scatter_(2, ids, True)[..., :size]
        return torch.where(seen, torch.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)


TOGETHER: dict[type, Callable[[Sequence[LogitsProcessor], torch.device], Step]] = {
    hf.MinLengthLogitsProcessor: _LeastLength,
    hf.MinNewTokensLengthLogitsProcessor: _LeastLength,
    hf.RepetitionPenaltyLogitsProcessor: _Repeated,
}
"""Processors that look at the text, written anew for ragged rows: one step for all rows and positions, and nothing waits for the
host. All others are asked row by row."""


def _for_row(processor: LogitsProcessor, row: int, pad: int) -> LogitsProcessor:
    """The processor as it would be if this row were decoded alone."""
    if isinstance(processor, hf.PrefixConstrainedLogitsProcessor):
        return _constrained_for_row(processor, row)
    name = LENGTHS.get(type(processor))
    length = getattr(processor, name) if name else None
    if name is None or length is None:
        return processor
    alone = copy.copy(processor)
    setattr(alone, name, int(length[row] if isinstance(length, Tensor) and length.dim() else length) - pad)
    return alone


def _constrained_for_row(processor: hf.PrefixConstrainedLogitsProcessor, row: int) -> LogitsProcessor:
    """The user's function wants the number of the row, and would be told 0 for each: rows come here one at a time."""
    allowed = processor._prefix_allowed_tokens_fn
    return hf.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), num_beams=1)


def _all_at_once(processor: LogitsProcessor, scores: Tensor, text: Text) -> Tensor:
    flat = scores.flatten(0, 1)
    processed: Tensor = processor(text.tokens.new_zeros(flat.shape[0], 0), flat)
    return processed.view_as(scores)


def _one_by_one(rows: Sequence[LogitsProcessor], scores: Tensor, text: Text) -> Tensor:
    """Each position alone, (1, n) ids and (1, V) scores, with exactly the tokens that stand before it."""
    return torch.stack(
        [
            torch.cat([processor(text.prefix(row, t), scores[row, t : t + 1].clone()) for t in range(scores.shape[1])])
            for row, processor in enumerate(rows)
        ]
    )
