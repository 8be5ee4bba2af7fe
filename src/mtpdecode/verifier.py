"""The verifier: one target forward over the pending token and the draft gives the target's law at every drafted position."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .cache import KVCacheManager
from .media import embedded, with_images
from .sampling import Sampler
from .state import DecodeState, Draft, Prompt
from .target import Ears, Hidden, forward, text_config


class Verifier:
    """The target, its cache and the user's processors.

    hidden  which hidden state the head wants; the same forward pass yields it
    """

    def __init__(
        self,
        target: PreTrainedModel,
        cache: KVCacheManager,
        sampler: Sampler,
        hidden: Hidden,
        prompt: Prompt,
    ) -> None:
        self.target, self.cache, self.sampler, self.hidden, self.prompt = target, cache, sampler, hidden, prompt
        self.ears = Ears(target, hidden)

    def listening(self) -> AbstractContextManager[None]:
        """Around a round: what follows the target is registered here, once, and outside of a graph."""
        return nullcontext() if self.cache.transformers_cache is None else self.ears.listening(self.cache.transformers_cache)

    def read(self, start: int, num_tokens: int, counts: Tensor) -> Tensor:
        """Prefill: the prompt's tokens from slot `start` on; keeps counts (B,) of them. -> hidden (B, num_tokens, D).

        Images and the like go with the prompt's first tokens, which are then all of them (`Prompt.is_whole`).
        """
        tokens, types = self.prompt.tokens[:, start : start + num_tokens], self.prompt.types
        types = types[:, :num_tokens] if types is not None else None
        hidden = self._forward(tokens, num_logits=1, types=types, media=self.prompt.media)[1]
        self.cache.commit(counts)
        return hidden

    def score(self, state: DecodeState, draft: Draft) -> tuple[Tensor, Tensor]:
        """One forward pass over [pending, draft] -> scores (B, K+1, V) float32 after the processors, hidden (B, K+1, D).

        tokens    a b c d e | x y        window  e x y        scores of position 0 judge x, of 1 y, of 2 what follows
        """
        text = state.text
        pending = text.at(text.lengths[:, None] - 1)
        tokens = torch.cat([pending, draft.tokens], dim=1)
        logits, hidden = self._forward(tokens, num_logits=tokens.shape[1])
        return self.sampler.scores(logits, text.with_draft(draft.tokens)), hidden

    def _forward(
        self, tokens: Tensor, num_logits: int, types: Tensor | None = None, media: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        window = self.prompt.placed(self.cache.window(tokens.shape[1]))
        if types is not None:
            window = with_images(window, types, text_config(self.target))
        inputs = {"input_ids": tokens}
        if self.prompt.embeds is not None:
            inputs = self.prompt.inputs(embedded(self.target, tokens), window.positions)
        return forward(self.target, inputs, window, num_logits, self.ears, media)
