"""The verifier: one target forward over the pending token and the draft gives the target's law at every drafted position."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .cache import KVCacheManager
from .sampling import Sampler
from .state import DecodeState, Draft, Prompt
from .target import forward


class Verifier:
    """The target, its cache and the user's processors.

    hidden  which hidden state the head wants; the same forward pass yields it
    """

    def __init__(
        self,
        target: PreTrainedModel,
        cache: KVCacheManager,
        sampler: Sampler,
        hidden: Literal["post_norm", "pre_norm"],
        prompt: Prompt,
    ) -> None:
        self.target, self.cache, self.sampler, self.hidden, self.prompt = target, cache, sampler, hidden, prompt

    def read(self, start: int, num_tokens: int, counts: Tensor) -> Tensor:
        """Prefill: the prompt's tokens from slot `start` on; keeps counts (B,) of them. -> hidden (B, num_tokens, D)."""
        tokens = self.prompt.tokens[:, start : start + num_tokens]
        hidden = self._forward(tokens, num_logits=1)[1]
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

    def _forward(self, tokens: Tensor, num_logits: int) -> tuple[Tensor, Tensor]:
        window = self.cache.window(tokens.shape[1])
        inputs = {"input_ids": tokens}
        if self.prompt.embeds is not None:
            embeds = self.target.get_input_embeddings()(tokens)
            inputs = {"inputs_embeds": self.prompt.embedded(embeds, window.positions)}
        return forward(self.target, inputs, window, num_logits, self.hidden)
