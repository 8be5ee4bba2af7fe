"""What a prompt may hold besides tokens: images, videos and sounds, for models where they are known to be read exactly."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .layers import SHARING
from .state import Window
from .target import decoder_of, evaluating, text_config, training_modules

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
