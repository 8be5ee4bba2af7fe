"""A target and a proposer whose laws are tables, for tests: every probability is known before anything runs."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .cache import KVCacheManager
from .errors import GenerationError
from .laws import Law, Tokens
from .proposer import Call, Proposer
from .sampling import race
from .state import DecodeState, Draft, Noise, Text

LOG_ZERO = -1e4
"""The logit of a token whose probability is 0: finite, so that 0 times it is 0; its exponential is 0 in every dtype."""
SHARPNESS = 1e4
"""Scale of `TableLM`'s attention scores: all tokens but the previous one have weight exp(-hundreds), which is 0."""
GAIN = 400.0
"""Scale of `TableLM`'s MLP: silu(GAIN / 2) is GAIN / 2 and silu(-GAIN / 2) is 0, in every dtype."""


def random_table(vocab_size: int, seed: int, num_zeros: int = 0) -> Tensor:
    """(V, V, V) float64 of [previous, current, next]: random laws of the next token, num_zeros entries of each being 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(vocab_size, vocab_size, vocab_size, generator=generator, dtype=torch.float64) ** 2 + 1e-3
    ranks = torch.rand(weights.shape, generator=generator).argsort(-1)
    weights = weights.masked_fill(ranks < num_zeros, 0.0)
    return weights / weights.sum(-1, keepdim=True)


def table_law(table: Tensor) -> Law:
    """The law that a table says. table (V, V) of [current, next], or (V, V, V) of [previous, current, next].

    The token before the first one counts as equal to it; an empty text as token 0.
    """
    table = _of_pairs(table)

    def law(text: Tokens) -> Tensor:
        current = text[-1] if text else 0
        return table[text[-2] if len(text) > 1 else current, current]

    return law


def _of_pairs(table: Tensor) -> Tensor:
    """(V, V) or (V, V, V) -> (V, V, V) float64."""
    if table.dim() not in (2, 3) or len(set(table.shape)) != 1:
        raise GenerationError(f"A table of shape {tuple(table.shape)} was given; it must be (V, V) or (V, V, V).")
    table = table.to(torch.float64)
    sums = table.sum(-1)
    if bool((table < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-6):
        raise GenerationError("The last axis of a table must hold laws: no entry below 0, every sum 1. Divide it by its sums.")
    return table if table.dim() == 3 else table.expand(len(table), -1, -1)


class TableLM(LlamaForCausalLM):
    """A causal language model whose law is a table: P(next | text) = table[previous, current, next], up to float rounding.

    table  (V, V, V) of [previous, current, next], or (V, V) of [current, next]; see `table_law`

    It is a real one-layer Llama with weights written by hand, so it decodes as every model does, and a fault in a cache, a mask
    or a position shows in its law. Its hidden state is one-hot, three times:

        [ current V | previous V | pair V*V ]
          embedding   attention    MLP             and the output layer says the pair's row of log(table)

    Attention looks exactly one token back: every query is the keys' vector turned by one position, times a large number. A unit
    of the MLP fires where both tokens of its pair are there. For texts of up to 512 tokens, in float32 or float64.
    """

    def __init__(self, table: Tensor) -> None:
        table = _of_pairs(table)
        size = len(table)
        config = LlamaConfig(
            vocab_size=size,
            hidden_size=2 * size + size**2,
            intermediate_size=size**2,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=max(4, size + size % 2),
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        super().__init__(config)
        self.table = table
        self.train(False).requires_grad_(False)
        for parameter in self.parameters():
            parameter.zero_()
        self._write_attention()
        self._write_mlp()
        self._write_output()

    def law(self, text: Tokens) -> Tensor:
        """(V,) float64: what the table says of the token behind a text."""
        return table_law(self.table)(text)

    def norm_weight(self, num_ones: int) -> float:
        """The weight with which a norm gives a vector of that many ones, and zeros, back as it is."""
        return float((num_ones / self.config.hidden_size + self.config.rms_norm_eps) ** 0.5)

    def _write_attention(self) -> None:
        """[current, 0, 0] -> [current, previous, 0]"""
        size, layer, turn = len(self.table), self.model.layers[0], self.model.rotary_emb.inv_freq
        one_hot, attention = torch.eye(size), layer.self_attn
        scale = SHARPNESS * attention.head_dim**0.5
        self.model.embed_tokens.weight[:, :size] = one_hot
        layer.input_layernorm.weight.fill_(self.norm_weight(1))
        attention.k_proj.weight[: len(turn), :size] = 1.0
        attention.q_proj.weight[:, :size] = scale * torch.cat([turn.cos(), -turn.sin()])[:, None]
        attention.v_proj.weight[:size, :size] = one_hot
        attention.o_proj.weight[size : 2 * size, :size] = one_hot

    def _write_mlp(self) -> None:
        """[current, previous, 0] -> [current, previous, pair], pairs in the order (0, 0) (0, 1) ... of (previous, current)"""
        size, layer = len(self.table), self.model.layers[0]
        one_hot = torch.eye(size)
        layer.post_attention_layernorm.weight.fill_(self.norm_weight(2))
        layer.mlp.gate_proj.weight[:, :size] = GAIN * (one_hot.repeat(size, 1) - 1.5)
        layer.mlp.gate_proj.weight[:, size : 2 * size] = GAIN * one_hot.repeat_interleave(size, 0)
        layer.mlp.up_proj.weight[:, :size] = 2 / GAIN
        layer.mlp.down_proj.weight[2 * size :] = torch.eye(size**2)

    def _write_output(self) -> None:
        """[current, previous, pair] -> [0, 0, pair] -> logits"""
        size = len(self.table)
        self.model.norm.weight[2 * size :] = self.norm_weight(3)
        self.lm_head.weight[:, 2 * size :] = self.table.log().clamp(min=LOG_ZERO).flatten(0, 1).T


class TableProposer(Proposer):
    """Drafts from a table, whatever the target and its processors say: q is known exactly, and as far from p as one likes.

    table    as for `TableLM`
    sampled  draw from the table and hand its law over; or take its likeliest token, so that q is one-hot
    """

    def __init__(self, table: Tensor, sampled: bool = True) -> None:
        self.table, self.sampled = _of_pairs(table), sampled

    def begin(self, call: Call, cache: KVCacheManager | None) -> None:
        self.purpose = call.purpose

    def propose(self, state: DecodeState, num_speculative_tokens: int, noise: Noise) -> Draft:
        text, tokens, laws = state.text, [state.text.tokens[:, :0]], []
        for step in range(num_speculative_tokens):
            laws.append(self.law(text, step))
            tokens.append(self.pick(laws[-1], text.lengths + step, noise)[:, None])
            text = text.with_draft(tokens[-1], step)
        return Draft(torch.cat(tokens, dim=1), torch.stack(laws, dim=1) if self.sampled and laws else None)

    def law(self, text: Text, step: int) -> Tensor:
        """(B, V) float32, of what stands behind `step` draft tokens."""
        last = text.lengths + step - 1
        previous, current = text.at(torch.stack([(last - 1).clamp(min=0), last], dim=1)).unbind(1)
        return self.table.to(last.device)[previous, current].float()

    def pick(self, law: Tensor, positions: Tensor, noise: Noise) -> Tensor:
        """law (B, V), positions (B,) -> tokens (B,)"""
        return race(law, noise.exponential(positions, self.purpose, law.shape[-1])) if self.sampled else law.argmax(-1)
