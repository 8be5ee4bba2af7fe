"""The target's parts that we use, and its forward pass over a window. The model itself is never changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .errors import UnsupportedModelError
from .state import Window

ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a ready mask with four axes, which ragged rows need."""

FINAL_NORMS = ("norm", "norm_f")
"""What models call the norm before their output layer."""


DSA = ("deepseek_v32", "glm_moe_dsa")
INDEXED = {"indexed_attention": DSA, "deepseek_sparse_attention": DSA, "minimax_m3_sparse": ("minimax_m3_vl_text",)}
"""Layer types that choose the keys they attend to (one has another name in transformers 5.17), and the model types whose choice
was seen to be made behind the mask: others of the same layer type go by the cache's length, which ragged rows do not have."""


SHARING = ("gemma4_text", "gemma4_unified_text")
"""Model types whose last layers read the keys and values of earlier ones and are known to be exact."""


class TargetOutput(NamedTuple):
    """logits (B, n, V) of the last n positions of the window; hidden (B, T, D) as the head wants it."""

    logits: Tensor
    hidden: Tensor


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the part that writes text."""
    return model.config.get_text_config(decoder=True)


def decoder_of(model: PreTrainedModel) -> Any:
    """The module with `layers` and a final norm. Raises UnsupportedModelError where there is none."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"A transformers model was to be decoded; found {type(model).__name__}. "
            "Load one with AutoModelForCausalLM, or pass a folder or repository to MTPDecoder.from_pretrained."
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model; mtpdecode decodes causal language models. "
            "Call model.generate() without it."
        )
    decoder = model.get_decoder().get_decoder()  # what a wrapper calls its decoder may be a whole language model
    parts = dict(decoder.named_children())
    missing = [name for name, present in (("layers", "layers" in parts), ("norm", _final_norm(parts))) if not present]
    if missing or lm_head_of(model) is None:
        lacking = ", ".join(missing) or "lm_head"
        raise UnsupportedModelError(
            f"{type(model).__name__} was to be decoded; its decoder {type(decoder).__name__} has no {lacking}. "
            "Load it with AutoModelForCausalLM; models of another build are not supported."
        )
    return decoder


def final_norm_of(model: PreTrainedModel) -> nn.Module:
    """The norm between the last layer and the output layer."""
    norm = _final_norm(dict(decoder_of(model).named_children()))
    assert norm is not None
    return norm


def _final_norm(parts: dict[str, nn.Module]) -> nn.Module | None:
    return next((parts[name] for name in FINAL_NORMS if name in parts), None)


def rotary_of(model: PreTrainedModel) -> nn.Module | None:
    """What turns positions into rotary embeddings; None in models that know no positions."""
    return dict(decoder_of(model).named_children()).get("rotary_emb")


def lm_head_of(model: PreTrainedModel) -> Any:
    """The output layer, or None."""
    return model.get_output_embeddings()


def layer_windows(config: PreTrainedConfig, class_name: str) -> dict[str, int | None]:
    """Layer type -> its sliding window, None for full attention; only types that decode exactly.

    Raises UnsupportedModelError that names the types which are not known to be safe.
    """
    _check_causal(config, class_name)
    num_own = num_own_layers(config, class_name)
    layers = DynamicCache(config=config).layers[:num_own]
    names = (getattr(config, "layer_types", None) or [])[:num_own] or [
        "sliding_attention" if type(layer) is DynamicSlidingWindowLayer else "full_attention" for layer in layers
    ]
    indexed = [config.model_type in INDEXED.get(name, ()) for name in names]
    others = [(name, type(layer)) for name, layer, known in zip(names, layers, indexed, strict=True) if not known]
    unknown = {name for name, _ in others if name not in ("full_attention", "sliding_attention")}
    unknown |= {kind.__name__ for _, kind in others if kind not in (DynamicLayer, DynamicSlidingWindowLayer)}
    if unknown:
        raise UnsupportedModelError(
            f"{class_name} was to be decoded speculatively; it has layers of type {', '.join(sorted(unknown))}, and only "
            "full_attention and sliding_attention are known to be exact. Call model.generate() without mtpdecode."
        )
    return {name: getattr(layer, "sliding_window", None) for name, layer in zip(names, layers, strict=True)}


def num_own_layers(config: PreTrainedConfig, class_name: str) -> int:
    """How many layers have keys and values of their own; those behind them read the ones of the last such layer of their type."""
    num_shared = getattr(config, "num_kv_shared_layers", None) or 0
    if num_shared and config.model_type not in SHARING:
        raise UnsupportedModelError(
            f"{class_name} was to be decoded speculatively; its last {num_shared} layers read the keys of others, which is known to "
            f"be exact for {', '.join(SHARING)} only. Call model.generate() without mtpdecode."
        )
    return int(config.num_hidden_layers) - num_shared


def _check_causal(config: PreTrainedConfig, class_name: str) -> None:
    if getattr(config, "use_bidirectional_attention", None) in ("all", True):
        raise UnsupportedModelError(
            f"{class_name} was to be decoded speculatively; its tokens see those behind them (use_bidirectional_attention="
            f"{config.use_bidirectional_attention!r}), so its keys are never final. Call model.generate() without mtpdecode."
        )


def check_attention(config: PreTrainedConfig, class_name: str) -> str:
    """The attention implementation, if it takes a ready mask. Raises UnsupportedModelError otherwise."""
    implementation = str(config._attn_implementation)
    if implementation not in ATTENTION:
        raise UnsupportedModelError(
            f"{class_name} runs attn_implementation={implementation!r}, which takes no ready mask for ragged rows. "
            'Load it with attn_implementation="sdpa" (or "eager").'
        )
    return implementation


def forward(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    window: Window,
    num_logits: int,
    hidden: Literal["post_norm", "pre_norm"],
    extra: dict[str, Any] | None = None,
) -> TargetOutput:
    """One forward pass over a window. inputs: {"input_ids": (B, T)} or {"inputs_embeds": (B, T, D)}.

    The hidden states are taken at the final norm by a hook that lives as long as the call.
    """
    num_tokens = window.positions.shape[1]
    kept = torch.arange(num_tokens - num_logits, num_tokens, device=window.positions.device)
    with _tap(final_norm_of(model), hidden) as tapped:
        logits = model(
            **inputs,
            **(extra or {}),
            attention_mask=window.mask,
            position_ids=window.positions,
            past_key_values=window.cache,
            use_cache=True,
            logits_to_keep=kept,  # as places: for a mere number Gemma 4 drops the other hidden states too
        ).logits
    return TargetOutput(logits, tapped[-1])


def training_modules(*roots: nn.Module) -> list[nn.Module]:
    """Every module that is in training mode."""
    return [module for root in roots for module in root.modules() if module.training]


@contextmanager
def evaluating(training: list[nn.Module]) -> Iterator[None]:
    """Without dropout inside; the given modules are in training mode again outside."""
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _tap(norm: nn.Module, hidden: Literal["post_norm", "pre_norm"]) -> Iterator[list[Tensor]]:
    tapped: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        tapped.append(output if hidden == "post_norm" else args[0])

    handle = norm.register_forward_hook(keep)
    try:
        yield tapped
    finally:
        handle.remove()
