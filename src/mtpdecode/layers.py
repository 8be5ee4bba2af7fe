"""Which layers are known to decode exactly, and what a cache must hold for each of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from .errors import UnsupportedModelError
from .recurrent import KINDS, LayerPlan, kind_of

ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a ready mask with four axes, which ragged rows need."""


NO_MIXER = ("moe", "mlp")
"""Layer types that look at no other token."""


DSA = ("deepseek_v32", "glm_moe_dsa", "dots3_note_text", "hy_v4")


QSA = ("qwen4_exp_text",)


INDEXED = {
    "indexed_attention": (*DSA, *QSA),
    "deepseek_sparse_attention": DSA,
    "qwen_sparse_attention": QSA,
    "minimax_m3_sparse": ("minimax_m3_vl_text",),
}
"""Layer types that choose the keys they attend to (one has another name in transformers 5.17), and the model types whose choice
was seen to be made behind the mask: others of the same layer type go by the cache's length, which ragged rows do not have."""


ALIGNED = {"indexed_attention": ("glm5_next_text",), "deepseek_sparse_attention": ("glm5_next_text",)}
"""The same for models that go by the cache's length, and allow for what is not there at the beginning of rows."""


COMPRESSED = dict.fromkeys(("compressed_sparse_attention", "heavily_compressed_attention"), ("deepseek_v4",))
"""Layer types that see blocks of tokens compressed into one key, and the model types that do it as the cache does."""


MASKS = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
"""Types of layers with attention and convolutions -> under which their attention looks up its mask."""


SHARING = ("gemma4_text", "gemma4_unified_text")
"""Model types whose last layers read the keys and values of earlier ones and are known to be exact."""


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
    indexed = [any(config.model_type in types.get(name, ()) for types in (INDEXED, COMPRESSED, ALIGNED)) for name in names]
    planned = [
        name in NO_MIXER or isinstance(layer, LinearAttentionCacheLayerMixin) for name, layer in zip(names, layers, strict=True)
    ]
    known = [one or other for one, other in zip(indexed, planned, strict=True)]
    others = [(name, type(layer)) for name, layer, is_known in zip(names, layers, known, strict=True) if not is_known]
    unknown = {name for name, _ in others if name not in ("full_attention", "sliding_attention")}
    unknown |= {kind.__name__ for _, kind in others if kind not in (DynamicLayer, DynamicSlidingWindowLayer)}
    if unknown:
        raise UnsupportedModelError(
            f"{class_name} was to be decoded speculatively; it has layers of type {', '.join(sorted(unknown))}, and where "
            f"model_type={config.model_type!r} only full_attention and sliding_attention are known to be exact. "
            "Call model.generate() without mtpdecode."
        )
    seeing = [(name, layer) for name, layer in zip(names, layers, strict=True) if isinstance(layer, CacheLayerMixin)]
    return {MASKS.get(name, name): getattr(layer, "sliding_window", None) for name, layer in seeing}


def layer_plans(config: PreTrainedConfig, blocks: Sequence[nn.Module], class_name: str) -> tuple[LayerPlan, ...]:
    """What a cache must hold for each layer; empty where all of them have keys and values and nothing else.

    Raises UnsupportedModelError that names the recurrent mixers which are not known to be exact.
    """
    layers, names = DynamicCache(config=config).layers, getattr(config, "layer_types", None) or []
    recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
    if not recurrent and not set(names) & {*NO_MIXER, *COMPRESSED} and config.model_type not in sum(ALIGNED.values(), ()):
        return ()
    plans = []
    for name, layer, block in zip(names, layers, blocks, strict=True):
        if isinstance(layer, LinearAttentionCacheLayerMixin) and name not in NO_MIXER:
            plans.append(_recurrent_plan(name, layer, block, class_name))
        elif config.model_type in COMPRESSED.get(name, ()):
            compressor = block.get_submodule("self_attn.compressor")
            plans.append(LayerPlan(name, mixer=compressor, block_size=config.compress_rates[name]))
        else:
            aligned = config.model_type in ALIGNED.get(name, ())
            plans.append(LayerPlan(name, keys=isinstance(layer, CacheLayerMixin), aligned=aligned))
    return tuple(plans)


def _recurrent_plan(name: str, layer: LinearAttentionCacheLayerMixin, block: nn.Module, class_name: str) -> LayerPlan:
    known = [(module, kind) for module in block.modules() if (kind := kind_of(module))]
    if not known:
        found = ", ".join(sorted({type(child).__name__ for child in block.children()}))
        raise UnsupportedModelError(
            f"{class_name} was to be decoded speculatively; its {name} layers are recurrent and made of {found}, none of which "
            f"is known to be exact; these are: {', '.join(kind.mixer for kind in KINDS)}. "
            "Call model.generate() without mtpdecode."
        )
    mixer = next((module for module, kind in known if kind.inputs), None)
    blanks = {number: getattr(module, name) for module, kind in known for number, name in kind.blanks}
    mask = "linear_attention" if name in MASKS else name  # of the convolutions; the attention beside them has one of its own
    return LayerPlan(mask, isinstance(layer, CacheLayerMixin), layer.number_of_states, mixer, blanks)


def num_own_layers(config: PreTrainedConfig, class_name: str) -> int:
    """How many layers have keys and values of their own; those behind them read the ones of the last such layer of their type."""
    num_shared = getattr(config, "num_kv_shared_layers", None) or 0
    if num_shared and config.model_type not in SHARING:
        raise UnsupportedModelError(
            f"{class_name} was to be decoded speculatively; its last {num_shared} layers read the keys of others, which "
            f"is known to be exact for {', '.join(SHARING)} only. Call model.generate() without mtpdecode."
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
