"""The target's parts that we use, and its forward pass over a window. The model itself is never changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .errors import UnsupportedModelError
from .state import Window

ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a ready mask with four axes, which ragged rows need."""


DSA = ("deepseek_v32", "glm_moe_dsa")
INDEXED = {"indexed_attention": DSA, "deepseek_sparse_attention": DSA, "minimax_m3_sparse": ("minimax_m3_vl_text",)}
"""Layer types that choose the keys they attend to (one has another name in transformers 5.17), and the model types whose choice
was seen to be made behind the mask: others of the same layer type go by the cache's length, which ragged rows do not have."""


class TargetOutput(NamedTuple):
    """logits (B, n, V) of the last n positions of the window; hidden (B, T, D) as the head wants it."""

    logits: Tensor
    hidden: Tensor


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the part that writes text."""
    return model.config.get_text_config(decoder=True)


def decoder_of(model: PreTrainedModel) -> Any:
    """The module with `layers`, `norm` and `rotary_emb`. Raises UnsupportedModelError where there is none."""
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
    decoder = model.get_decoder()
    parts = dict(decoder.named_children())
    missing = [name for name in ("layers", "norm", "rotary_emb") if name not in parts]
    if missing or lm_head_of(model) is None:
        lacking = ", ".join(missing) or "lm_head"
        raise UnsupportedModelError(
            f"{type(model).__name__} was to be decoded; its decoder {type(decoder).__name__} has no {lacking}. "
            "Load it with AutoModelForCausalLM; models of another build are not supported."
        )
    return decoder


def final_norm_of(model: PreTrainedModel) -> nn.Module:
    """The norm between the last layer and the output layer."""
    return decoder_of(model).norm  # type: ignore[no-any-return]


def lm_head_of(model: PreTrainedModel) -> Any:
    """The output layer, or None."""
    return model.get_output_embeddings()


def layer_windows(config: PreTrainedConfig, class_name: str) -> dict[str, int | None]:
    """Layer type -> its sliding window, None for full attention; only types that decode exactly.

    Raises UnsupportedModelError that names the types which are not known to be safe.
    """
    layers = DynamicCache(config=config).layers
    names = getattr(config, "layer_types", None) or [
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
    with _tap(final_norm_of(model), hidden) as tapped:
        logits = model(
            **inputs,
            **(extra or {}),
            attention_mask=window.mask,
            position_ids=window.positions,
            past_key_values=window.cache,
            use_cache=True,
            logits_to_keep=num_logits,
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
