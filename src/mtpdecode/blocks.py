"""A head's blocks that are no single layer of the target's class, made of that class's own parts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .errors import UnsupportedModelError
from .spec import MTPSpec
from .state import Window

WITHOUT_STATE = ("full_attention", "moe", "mlp")
"""Kinds of sub-layers that a head may have: what they keep of the past lies in the slots of the cache."""


def sublayer_kinds(config: PreTrainedConfig, spec: MTPSpec, num_layers: int) -> list[str]:
    """The kinds of the layers that one block is a row of. Raises UnsupportedModelError for what no head was seen to have."""
    kinds = list(getattr(config, str(spec.sublayers)))
    strange = sorted(set(kinds) - set(WITHOUT_STATE))
    if strange or num_layers > 1:
        found = f"sub-layers of type {', '.join(strange)}" if strange else f"{num_layers} MTP layers"
        raise UnsupportedModelError(
            f"The {spec.family} head was asked for; its config has {found}, and mtpdecode knows heads of one MTP layer that is "
            f"made of {', '.join(WITHOUT_STATE)}. To speculate without a head, pass proposer=NGramProposer()."
        )
    return kinds


class PlainLayer(nn.Module):
    """Attention and MLP of one layer, joined by mere addition: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, layer: nn.Module) -> None:
        """The parts of a layer, without what joins them in the target: hyper-connections."""
        super().__init__()
        for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
            self.add_module(name, layer.get_submodule(name))

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), **kwargs)[0]  # type: ignore[operator]
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return, operator]


class HalfLayer(PlainLayer):
    """One attention and one MLP of a target whose layers have two of each."""

    def __init__(self, layer: nn.Module, config: PreTrainedConfig, index: int, norms: tuple[nn.Module, nn.Module]) -> None:
        nn.Module.__init__(self)
        attention, mlp = layer.self_attn[0], layer.mlps[0]  # type: ignore[index]
        self.self_attn, self.mlp = type(attention)(config, index), type(mlp)(config)
        self.input_layernorm, self.post_attention_layernorm = norms


class SubLayers(nn.Module):
    """Several layers of the target's class, one behind the other; the last one carries the norm of the whole.

    layers.0.*, layers.1.*, ..., layers.1.final_layernorm
    """

    def __init__(self, layer_class: type[nn.Module], config: PreTrainedConfig, norm: nn.Module) -> None:
        super().__init__()
        self.kinds = list(config.layer_types)
        self.layers = nn.ModuleList([layer_class(config, index) for index in range(len(self.kinds))])
        self.layers[-1].final_layernorm = norm

    def forward(self, x: Tensor, attention_mask: Any, **kwargs: Any) -> Tensor:
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            mask = attention_mask[kind] if isinstance(attention_mask, dict) else attention_mask
            x = layer(x, attention_mask=mask, **kwargs)
        return self.layers[-1].final_layernorm(x)  # type: ignore[no-any-return, operator]


# ── several residual streams ────────────────────────────────────────────────────────────────────────────────────────────────


def own_mixer(mixer: nn.Module | None, spec: MTPSpec) -> nn.Module:
    """A mixer like the target's, for the head to load its own weights into."""
    if mixer is None:
        raise UnsupportedModelError(
            f"The {spec.family} head was asked for; it is fed several residual streams, and this target has one. "
            "Give the target that the head was trained with, or pass the spec=MTPSpec(...) that describes it."
        )
    return copy.deepcopy(mixer)


def stream_norms(norm: nn.Module, spec: MTPSpec, config: PreTrainedConfig) -> tuple[nn.Module, nn.Module]:
    """What norms embeddings, and what norms streams (B, T, streams * D). norm: a new one as the target's mixer has it.

    each     weight (D,), every stream on its own       joint    weight (streams * D,), all of them together
    grouped  weight (streams * D,), every stream on its own: as the mixer of Qwen4-exp does
    """
    kind, size, eps = type(norm), config.hidden_size, config.rms_norm_eps
    if spec.stream_norm == "grouped":
        return kind(size, eps=eps), norm
    return kind(size, eps=eps), kind(size if spec.stream_norm == "each" else size * num_streams(spec, config), eps=eps)


def num_streams(spec: MTPSpec, config: PreTrainedConfig) -> int:
    """How many residual streams a head has."""
    return int(getattr(config, spec.streams)) if spec.streams else 1


def rotary_angles(rotary: Any, spec: MTPSpec, x: Tensor, window: Window) -> Any:
    """Rotary angles for layers that want more than the window's own."""
    if spec.angles == "three_axes":
        return rotary(x, window.positions.expand(3, -1, -1) if window.axes is None else window.axes)
    if spec.angles == "all_types":
        return {name: rotary(x, window.positions, name) for name in rotary.layer_types}
    assert isinstance(window.mask, Tensor)
    slots = torch.arange(window.mask.shape[-1], device=x.device).expand(len(x), -1)
    return rotary(x, torch.cat([slots, window.positions], dim=-1).expand(3, -1, -1))
