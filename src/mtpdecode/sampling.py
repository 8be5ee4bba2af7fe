"""From logits to laws: the target's and the draft's logits pass through the same processors, each with its true prefix."""

from __future__ import annotations

import copy
from collections.abc import Sequence

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
    """

    def __init__(self, processors: Sequence[LogitsProcessor], do_sample: bool, padding: Sequence[int]) -> None:
        for processor in processors:
            if isinstance(processor, REFUSED):
                raise GenerationError(
                    f"{type(processor).__name__} was asked for; it keeps a state between calls, so drafted positions cannot be "
                    "processed exactly. Leave its option out, or call model.generate() without mtpdecode."
                )
        self.do_sample = do_sample
        self.is_prefix_free = all(type(processor) in PREFIX_FREE for processor in processors)
        self._rows = [[_for_row(processor, row, pad) for row, pad in enumerate(padding)] for processor in processors]

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the largest logit decides: no processors, no sampling."""
        return not (self.do_sample or self._rows)

    def scores(self, logits: Tensor, text: Text) -> Tensor:
        """logits (B, T, V) -> processed scores (B, T, V) float32.

        Position t of row b stands behind text.tokens[b, : text.lengths[b] + t].
        """
        scores = logits.to(torch.float32)
        for rows in self._rows:
            scores = _all_at_once(rows[0], scores, text) if type(rows[0]) in PREFIX_FREE else _one_by_one(rows, scores, text)
        return scores

    def law(self, scores: Tensor) -> Tensor:
        """scores (..., V) -> probabilities (..., V) float32; one-hot without sampling."""
        if self.do_sample:
            return scores.softmax(-1)
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)

    def draw(self, scores: Tensor, noise: Noise, positions: Tensor, purpose: int) -> Tensor:
        """scores (B, V), positions (B,) -> tokens (B,) int64, one draw from the law of each row."""
        if not self.do_sample:
            return scores.argmax(-1)
        return race(scores.softmax(-1), noise.exponential(positions, purpose, scores.shape[-1]))


def race(weights: Tensor, exponentials: Tensor) -> Tensor:
    """weights (B, V) >= 0 of any sum, exponentials (B, V) ~ Exp(1) -> (B,) int64 drawn in proportion to the weights.

    The first of independent Poisson clocks to ring: no sum, no synchronisation.
    """
    return (weights / exponentials).argmax(-1)


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
