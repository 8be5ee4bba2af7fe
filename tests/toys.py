"""Tiny targets and heads with known behaviour, for every test that wants one. Seeded; nothing is downloaded."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from mtpdecode.families import spec_for
from mtpdecode.head import MTPHead
from mtpdecode.testing import TableLM, random_table

LLAMA = spec_for("llama", "LlamaForCausalLM")


def tiny_llama(vocab_size: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32, num_layers: int = 2) -> LlamaForCausalLM:
    """A random Llama with grouped queries, whose laws are neither flat nor certain."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def random_head(
    target: LlamaForCausalLM, seed: int = 1, num_layers: int = 1, draft_vocabulary: list[int] | None = None
) -> MTPHead:
    """A head that knows nothing, about as wild as `tiny_llama`."""
    torch.manual_seed(seed)
    ids = None if draft_vocabulary is None else torch.tensor(draft_vocabulary)
    head = MTPHead(target, LLAMA, num_layers, ids).eval()
    for parameter in head.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return head.requires_grad_(False)


def exact_head(target: TableLM, previous: Literal["hidden", "cache"] = "hidden", num_layers: int = 1) -> MTPHead:
    """A head that says the table's own law at every depth, so that every draft is kept.

    previous  where it learns of the token before the one that it is given: the hidden state, or its own cache

    The table needs (previous, current). The head is given the embedding of `current` and the hidden state one position before,
    which is the one-hot pair that ends in `previous`; with "cache" it looks one place back instead, as the target does.
    """
    size, block = len(target.table), target.model.layers[0]
    head = MTPHead(target, LLAMA, num_layers).eval().requires_grad_(False)
    for layer in head.layers:
        layer.norm_embed.weight.fill_(target.norm_weight(1))
        layer.norm_hidden.weight.fill_(target.norm_weight(1))
        layer.norm_out.load_state_dict(target.model.norm.state_dict())
        layer.block.load_state_dict(block.state_dict())
        layer.proj.weight.zero_()
        layer.proj.weight[:size, :size] = torch.eye(size)
        if previous == "hidden":
            layer.block.self_attn.o_proj.weight.zero_()
            pairs = layer.proj.weight[:, -size * size :].view(-1, size, size)
            pairs[size : 2 * size] = torch.eye(size)[:, None]  # every pair (a, b) counts as b
    return head


def table_target(vocab_size: int = 4, seed: int = 0, num_zeros: int = 0) -> TableLM:
    """A target whose laws are known exactly."""
    return TableLM(random_table(vocab_size, seed, num_zeros))


class Contrary(LogitsProcessor):
    """A user's own processor that depends on the whole prefix: by turns, another token is made likelier."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        favourite = (input_ids * torch.arange(1, input_ids.shape[1] + 1)).sum(-1) % scores.shape[1]
        return scores.scatter_add(1, favourite[:, None], torch.full_like(scores[:, :1], 1.5))
