"""Train a head: the loss of every draft step, teacher-forced. Nothing imports this file, so inference never pays for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from .cache import CacheLayout
from .errors import GenerationError
from .head import MTPHead
from .layers import check_attention, layer_plans, layer_windows
from .state import Window
from .target import decoder_of, forward, lm_head_of, text_config


def mtp_loss(head: MTPHead, target: PreTrainedModel, input_ids: Tensor, num_steps: int = 1, decay: float = 0.6) -> Tensor:
    """The weighted cross-entropy of each draft step, (num_steps,) float32, on the head's device; sum it to get the loss.

    input_ids (B, T) int64, without padding, T > num_steps + 1. Step k at row j sees the true token j + k and is to predict token
    j + k + 1; its weight is decay**(k-1), normalised to sum 1 (FastMTP, 2509.18362, section 3, trains one recurrent layer so).
    The first step is fed the target's hidden states, every further one the output of the step before, and attends to its own
    step's rows; `scripts/train_head.py` has the mask that equals decoding exactly.

    The target is read without gradients: only the head learns.
    """
    if input_ids.shape[1] < num_steps + 2:
        raise GenerationError(f"Rows of {input_ids.shape[1]} tokens were given for {num_steps} steps; they need {num_steps + 2}.")
    hidden = target_hidden(head, target, input_ids)
    losses = []
    for step in range(num_steps):
        length = input_ids.shape[1] - step - 2
        hidden = hidden[:, :length]
        layer, tokens = head.layer_for(step), input_ids[:, step + 1 : step + 1 + length]
        embeds = head.embed(tokens, layer) if head.spec.embedding == "own" else head.embed(tokens).detach()
        normed, hidden = head(layer, embeds, hidden, _training_window(head, hidden))
        losses.append(_cross_entropy(head, target, normed, input_ids[:, step + 2 :], layer))
    weights = torch.tensor([decay**step for step in range(num_steps)], device=losses[0].device)
    return torch.stack(losses) * weights / weights.sum()


@torch.no_grad()
def target_hidden(head: MTPHead, target: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """(B, T, D): the hidden states that the head is fed, of every position."""
    config, name = text_config(target), type(target).__name__
    plans = layer_plans(config, decoder_of(target).layers, name)
    layout = CacheLayout(layer_windows(config, name), check_attention(config, name), target.dtype, plans)
    return forward(target, {"input_ids": input_ids}, _window(layout, config, input_ids), 1, head.spec.hidden).hidden


def _window(layout: CacheLayout, config: PreTrainedConfig, rows: Tensor) -> Window:
    """All of a batch's rows (B, T, ...) at once, causal, with an empty cache."""
    positions = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[0], -1)
    return Window(positions, layout.mask(positions, rows.shape[1]), DynamicCache(config=config))


def _training_window(head: MTPHead, hidden: Tensor) -> Window:
    config, name, attention = head.config, "the MTP head", str(head.config._attn_implementation)
    layout = CacheLayout(layer_windows(config, name), attention, hidden.dtype, layer_plans(config, head.blocks, name))
    return _window(layout, config, hidden)


def _cross_entropy(head: MTPHead, target: PreTrainedModel, normed: Tensor, labels: Tensor, layer: int) -> Tensor:
    lm_head = lm_head_of(target)
    if head.spec.lm_head == "own":
        logits = head.layers[layer].lm_head(head.scaled(normed))  # type: ignore[operator]
    else:
        bias = None if lm_head.bias is None else lm_head.bias.detach()
        logits = F.linear(head.scaled(normed), lm_head.weight.detach(), bias)[..., : head.vocab_size]
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
