"""A family's MTP head, built from its row of the table and the target's own layer class."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .spec import MTPSpec
from .state import Window
from .target import decoder_of, lm_head_of, text_config


class Shared(NamedTuple):
    """The target's modules that a head uses and does not own."""

    embedding: nn.Module
    lm_head: Any
    rotary: nn.Module


class MTPLayer(nn.Module):
    """One depth: proj(concat of the two norms) -> one decoder layer of the target's class -> norm_out."""

    def __init__(self, target: PreTrainedModel, spec: MTPSpec, config: PreTrainedConfig, index: int) -> None:
        super().__init__()
        decoder, size, self.spec = decoder_of(target), config.hidden_size, spec
        norm = type(decoder.norm)
        self.norm_embed, self.norm_hidden, self.norm_out = (norm(size, eps=config.rms_norm_eps) for _ in range(3))
        self.proj = nn.Linear(2 * size, size, bias=False)
        self.block = type(decoder.layers[-1])(config, index)

    def forward(self, embeds: Tensor, hidden: Tensor, window: Window, rotary: nn.Module) -> tuple[Tensor, Tensor]:
        """embeds, hidden (B, T, D) -> (what the output layer reads, what the next draft step is fed), (B, T, D) each."""
        pair = [self.norm_embed(embeds), self.norm_hidden(hidden)]
        x = self.proj(torch.cat(pair if self.spec.combine == "embed_hidden" else pair[::-1], dim=-1))
        raw = self.block(
            x,
            attention_mask=window.mask,
            position_ids=window.positions,
            past_key_values=window.cache,
            use_cache=True,
            position_embeddings=rotary(x, window.positions),
        )
        normed = self.norm_out(raw)
        return normed, normed if self.spec.recycle == "normed" else raw


class MTPHead(nn.Module):
    """A native multi-token-prediction head: `num_layers` depths around one target.

    draft_vocabulary        (V_draft,) int64: the ids over which the head drafts; None: all. Only q changes: any list is lossless
    num_speculative_tokens  the K that suits the head: its number of layers, unless it was trained for more

    The target's embedding and output layer are used, not owned: they are in no state dict of the head and never move with it.
    """

    draft_vocabulary: Tensor | None
    _draft_rows: Tensor | None

    def __init__(
        self, target: PreTrainedModel, spec: MTPSpec, num_layers: int = 1, draft_vocabulary: Tensor | None = None
    ) -> None:
        super().__init__()
        decoder = decoder_of(target)
        self.spec, self.config = spec, head_config(target, num_layers)
        self.num_speculative_tokens = num_layers
        embedding, lm_head = target.get_input_embeddings(), lm_head_of(target)
        self._shared = [Shared(embedding, lm_head, decoder.rotary_emb)]  # in a list: not a submodule
        self.layers = nn.ModuleList([MTPLayer(target, spec, self.config, index) for index in range(num_layers)])
        self.register_buffer("draft_vocabulary", draft_vocabulary, persistent=False)
        weight = lm_head.weight
        self.to(device=weight.device, dtype=weight.dtype)
        rows = None if self.draft_vocabulary is None else weight.detach()[self.draft_vocabulary]
        self.register_buffer("_draft_rows", rows, persistent=False)

    @property
    def num_layers(self) -> int:
        """How many depths the head has; a deeper draft reuses the last one."""
        return len(self.layers)

    @property
    def num_target_layers(self) -> int:
        """How many layers the target has."""
        return self.config.num_target_layers  # type: ignore[no-any-return]

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T, D), the target's own embedding."""
        return self._shared[0].embedding(tokens)  # type: ignore[no-any-return]

    def forward(self, depth: int, embeds: Tensor, hidden: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """One depth over a window: see `MTPLayer.forward`."""
        return self.layers[depth](embeds, hidden, window, self._shared[0].rotary)  # type: ignore[no-any-return]

    def logits(self, normed: Tensor) -> Tensor:
        """normed (B, D) -> (B, V_draft), over the draft vocabulary."""
        if self._draft_rows is None:
            return self._shared[0].lm_head(normed)  # type: ignore[no-any-return]
        return F.linear(normed, self._draft_rows)

    def token_ids(self, choices: Tensor) -> Tensor:
        """Places in the draft vocabulary -> token ids."""
        return choices if self.draft_vocabulary is None else self.draft_vocabulary[choices]

    def full_logits(self, logits: Tensor) -> Tensor:
        """logits (B, V_draft) -> (B, V), -inf for tokens that are never drafted."""
        if self.draft_vocabulary is None:
            return logits
        vocab_size = self._shared[0].lm_head.weight.shape[0]
        full = logits.new_full((*logits.shape[:-1], vocab_size), float("-inf"))
        return full.index_copy_(-1, self.draft_vocabulary, logits)


def head_config(target: PreTrainedModel, num_layers: int) -> PreTrainedConfig:
    """A copy of the target's config, from which the decoder layer class builds layer 0..num_layers-1 of a head.

    MTP layers are always of the last layer's kind: mixture-of-experts where the base is, and of its attention type.
    """
    config = copy.deepcopy(text_config(target))
    config.num_target_layers = config.num_hidden_layers
    config.num_hidden_layers = num_layers
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(config, key, None) is not None:
            setattr(config, key, [getattr(config, key)[-1]] * num_layers)
    if getattr(config, "first_k_dense_replace", None) is not None:
        config.first_k_dense_replace = 0
    return config
