"""The target's parts that we use, and its forward pass over a window. The model itself is never changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from .distances import told
from .errors import UnsupportedModelError
from .recurrent import KINDS, LayerPlan, kind_of, listening
from .state import Window

ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a ready mask with four axes, which ragged rows need."""

NO_MIXER = ("moe", "mlp")
"""Layer types that look at no other token."""

MIXERS = ("hc_head", "hyper_connection_mixer")
"""What models with several residual streams call the module that makes one state of them."""

FINAL_NORMS = ("norm", "norm_f", "hyper_connection_mixer")
"""What models call the norm before their output layer; in Qwen4-exp the mixer, which norms inside, comes last."""

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

MEDIA = {"image_token_id": 1, "video_token_id": 2, "audio_token_id": 3}
"""Config field that names the token which holds the place of an image and the like -> its number in `mm_token_type_ids`."""

MULTIMODAL = ("gemma4", "gemma4_unified")
"""Model types whose images are known to be read exactly: they change embeddings and masks, and no positions."""

AXES = ("glm_ocr", "qwen3_5", "qwen3_5_moe")
"""Model types whose images change embeddings, and positions: each token has one in time, in height and in width."""

MOVING = ("gemma4", *AXES)
"""Model types that were seen to read videos exactly too, and sounds where they hear; the others are shown for images alone."""

MERGED = ("exaone4_5", "glm5_next", "minimax_m3_vl", *AXES)
"""Model types whose images change embeddings and no mask: they are made once, and the prompt decodes like one of embeddings."""

MASKS = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
"""Types of layers with attention and convolutions -> under which their attention looks up its mask."""

SHARING = ("gemma4_text", "gemma4_unified_text")
"""Model types whose last layers read the keys and values of earlier ones and are known to be exact."""


Hidden = Literal["post_norm", "pre_norm", "streams"]


class TargetOutput(NamedTuple):
    """logits (B, n, V) of the last n positions of the window; hidden (B, T, D) as the head wants it, or (B, T, streams * D)."""

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
    """The module between the last layer and the output layer: a norm."""
    norm = _final_norm(dict(decoder_of(model).named_children()))
    assert norm is not None
    return norm


def example_norm_of(model: PreTrainedModel) -> nn.Module:
    """A norm as the model has them: the final one, or the mixer's own where a mixer comes last."""
    final = final_norm_of(model)
    return dict(final.named_children()).get("hc_norm", final)


def _final_norm(parts: dict[str, nn.Module]) -> nn.Module | None:
    return next((parts[name] for name in FINAL_NORMS if name in parts), None)


def mixer_of(model: PreTrainedModel) -> nn.Module | None:
    """What makes one state of several residual streams; None in models that have but one."""
    parts = dict(decoder_of(model).named_children())
    return next((parts[name] for name in MIXERS if name in parts), None)


def embedding_norm_of(model: PreTrainedModel) -> nn.Module | None:
    """What norms embeddings before the first layer; None where nothing does, or the embedding itself."""
    return dict(decoder_of(model).named_children()).get("embed_norm")


def rotary_of(model: PreTrainedModel) -> nn.Module | None:
    """What turns positions into rotary embeddings; None in models that know no positions."""
    return dict(decoder_of(model).named_children()).get("rotary_emb")


def lm_head_of(model: PreTrainedModel) -> Any:
    """The output layer, or None; some wrappers leave it to the language model inside."""
    return model.get_output_embeddings() or model.get_decoder().get_output_embeddings()


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


def has_own_code(model: PreTrainedModel) -> bool:
    """Whether a model's code came with its checkpoint."""
    return type(model).__module__.startswith("transformers_modules")


def check_own_code(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError where a model that comes with its own code says too little of its layers to be exact."""
    config, name = text_config(model), type(model).__name__
    if not has_own_code(model):
        return
    window, told = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if model._is_stateful:
        why = "keeps a recurrent state, and in code that came with a checkpoint none is known to be exact. Call model.generate()"
    elif window is not None and not told:
        why = (
            f"has sliding_window={window} and no layer_types, so nobody can know which of its layers slide. Set "
            "model.config.layer_types, 'full_attention' or 'sliding_attention' for each layer, or call model.generate()"
        )
    else:
        return
    raise UnsupportedModelError(f"{name} was to be decoded speculatively; it {why} without mtpdecode.")


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


def prompt_keywords(model: PreTrainedModel) -> set[str]:
    """What a prompt may hold for the model besides tokens: keywords of its forward that are known to be read exactly."""
    model_type = model.config.model_type
    known = {"per_layer_inputs"} if model_type in SHARING else set()
    if model_type in (*MULTIMODAL, *MERGED):
        known |= {"pixel_values", "image_position_ids", "image_grid_thw", "mm_encoder_outputs"}
    if model_type in MOVING:
        known |= {"pixel_values_videos", "video_position_ids", "num_frames_per_video", "video_grid_thw"}
        known |= {"input_features", "input_features_mask"}
    if model_type in MULTIMODAL:
        known |= {"mm_token_type_ids", "per_layer_inputs"}
    if has_axes(model):
        known |= {"mm_token_type_ids"}
    return known & forward_keywords(model)


def merges_media(model: PreTrainedModel) -> bool:
    """Whether images change the embeddings of a prompt, and no mask."""
    return model.config.model_type in MERGED


def has_axes(model: PreTrainedModel) -> bool:
    """Whether tokens have positions in time, height and width."""
    return model.config.model_type in AXES


class _Caught(Exception):
    """The embeddings are there; the rest of the forward pass is not wanted."""


def merged_embeddings(model: PreTrainedModel, tokens: Tensor, media: Mapping[str, Any]) -> Tensor:
    """tokens (B, P) and images -> (B, P, D), as the model's own forward hands them to the part that writes text."""
    caught: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(kwargs["inputs_embeds"])
        raise _Caught

    handle = decoder_of(model).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), evaluating(training_modules(model)), suppress(_Caught):
            model(input_ids=tokens, position_ids=torch.zeros_like(tokens), use_cache=False, **media)
    finally:
        handle.remove()
    return caught[0]


def forward_keywords(model: PreTrainedModel) -> set[str]:
    """Every keyword of the model's forward."""
    return set(signature(type(model).forward).parameters)


def placeholders(model: PreTrainedModel) -> list[int]:
    """The tokens that hold the place of an image, a video or a sound, in models that read these exactly."""
    ids = [getattr(model.config, name, None) for name in MEDIA] if model.config.model_type in MULTIMODAL else []
    return [token for token in ids if token is not None]


def embedded(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """tokens (B, T) -> what the model's forward takes instead: inputs_embeds (B, T, D), and per_layer_inputs (B, T, L, d) where
    every layer has an embedding of its own."""
    inputs = {"inputs_embeds": model.get_input_embeddings()(tokens)}
    if has_per_layer_inputs(model):
        inputs["per_layer_inputs"] = decoder_of(model).get_per_layer_inputs(tokens, None)
    return inputs


def per_layer_inputs(model: PreTrainedModel, embeds: Tensor) -> Tensor:
    """embeds (B, T, D) of tokens -> (B, T, L, d), looked up by token. Raises RuntimeError where one of them is no token's."""
    return decoder_of(model).get_per_layer_inputs(None, embeds)  # type: ignore[no-any-return]


def has_per_layer_inputs(model: PreTrainedModel) -> bool:
    """Whether every layer has an embedding of its own, which is looked up by token."""
    return "per_layer_inputs" in prompt_keywords(model) and bool(text_config(model).hidden_size_per_layer_input)


def with_images(window: Window, types: Tensor, config: PreTrainedConfig) -> Window:
    """A window from slot 0 on in which the tokens of one image see each other, where the model wants it so.

        types  0 1 1 0        slots  1 0 0 0
                                     1 1 1 0      the image's first token sees its second
                                     1 1 1 0
                                     1 1 1 1

    gemma4 has it in its sliding layers, whose windows still end behind; gemma4_unified in all layers, over the whole image.

    types  (B, T) int64: 1 for tokens of an image, 2 of a video, else 0
    """
    if getattr(config, "use_bidirectional_attention", None) != "vision" or not isinstance(window.mask, dict):
        return window
    seen, everywhere = _same_image(types), config.model_type == "gemma4_unified_text"
    ahead = {kind: seen if everywhere else seen.triu() for kind in window.mask if everywhere or kind == "sliding_attention"}
    shown = {kind: _uncovered(window.mask[kind], tokens) for kind, tokens in ahead.items()}
    return window._replace(mask=window.mask | shown)


def _same_image(types: Tensor) -> Tensor:
    """types (B, T) -> (B, T, T) bool: tokens that stand together without text between them."""
    image = (types == 1) | (types == 2)
    number = (image & ~torch.nn.functional.pad(image, (1, -1))).cumsum(-1)
    return (number[:, :, None] == number[:, None, :]) & image[:, :, None] & image[:, None, :]


def _uncovered(mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """mask (B, 1, T, S), in which every token also sees tokens (B, T, T) of the window, which begins at slot 0."""
    if mask is None:
        return None
    slots = torch.nn.functional.pad(tokens, (0, mask.shape[-1] - tokens.shape[-1]))[:, None]
    return mask | slots if mask.dtype == torch.bool else mask.masked_fill(slots, 0.0)


def check_attention(config: PreTrainedConfig, class_name: str) -> str:
    """The attention implementation, if it takes a ready mask. Raises UnsupportedModelError otherwise."""
    implementation = str(config._attn_implementation)
    if implementation not in ATTENTION:
        raise UnsupportedModelError(
            f"{class_name} runs attn_implementation={implementation!r}, which takes no ready mask for ragged rows. "
            'Load it with attn_implementation="sdpa" (or "eager").'
        )
    return implementation


class Tap:
    """Hears the hidden states that a head wants where the model makes them: at its final norm, or at the mixer of its streams.

    The hook lives as long as somebody listens; the model is as it was before and after.
    """

    def __init__(self, model: PreTrainedModel, hidden: Hidden) -> None:
        module = mixer_of(model) if hidden == "streams" else final_norm_of(model)
        assert module is not None  # no head that is fed streams can be built for a target without them
        self.module, self.hidden, self.is_listening = module, hidden, False
        self.heard = torch.empty(0)

    @contextmanager
    def listening(self) -> Iterator[Tap]:
        handle, self.is_listening = self.module.register_forward_hook(self._hear), True
        try:
            yield self
        finally:
            handle.remove()
            self.is_listening = False

    def _hear(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.heard = output if self.hidden == "post_norm" else args[0].flatten(2)  # streams one behind the other


def forward(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    window: Window,
    num_logits: int,
    hidden: Hidden | Tap,
    extra: Mapping[str, Any] | None = None,
) -> TargetOutput:
    """One forward pass over a window. inputs: {"input_ids": (B, T)} or {"inputs_embeds": (B, T, D)}.

    hidden  which hidden states are wanted, or a tap that is listening for them
    """
    if not isinstance(hidden, Tap):
        with Tap(model, hidden).listening() as tap:
            return forward(model, inputs, window, num_logits, tap, extra)
    num_tokens = window.positions.shape[1]
    kept = torch.arange(num_tokens - num_logits, num_tokens, device=window.positions.device)
    with listening(window.cache), told(decoder_of(model).layers, window.positions):
        logits = model(
            **inputs,
            **(extra or {}),
            attention_mask=window.mask,
            position_ids=window.positions if window.axes is None else window.axes,
            past_key_values=window.cache,
            use_cache=True,
            logits_to_keep=kept,  # as places: for a mere number Gemma 4 drops the other hidden states too
        ).logits
    return TargetOutput(logits, hidden.heard)


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
