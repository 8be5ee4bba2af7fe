"""What a user asked of `generate`: checked, with a clear word for what is wrong or not ours, and put in our terms."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, PreTrainedModel, StoppingCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from .errors import GenerationError
from .media import (
    embedded,
    forward_keywords,
    has_axes,
    has_per_layer_inputs,
    merged_embeddings,
    merges_media,
    per_layer_inputs,
    placeholders,
    prompt_keywords,
)
from .state import Prompt, Text
from .stopping import Stopping
from .target import CACHE_NAMES, text_config

INPUTS = ("input_ids", "attention_mask", "inputs_embeds")
PER_TOKEN = ("input_ids", "inputs_embeds", "mm_token_type_ids", "per_layer_inputs")
"""Inputs with an entry (B, P, ...) for every token of the prompt."""
PREPARED = (*INPUTS, "position_ids", *CACHE_NAMES, "use_cache", "logits_to_keep", "cache_position")
"""What transformers hands to a custom_generate by itself."""

NOT_OURS: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((None, 1), "beams are not drafted"),
    "num_beam_groups": ((None, 1), "beams are not drafted"),
    "constraints": ((None,), "constrained beam search is not drafted"),
    "force_words_ids": ((None,), "constrained beam search is not drafted"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search is not drafted"),
    "dola_layers": ((None,), "DoLa is not drafted"),
    "guidance_scale": ((None, 1, 1.0), "guidance runs the model a second time behind our back"),
    "negative_prompt_ids": ((None,), "guidance runs the model a second time behind our back"),
    "negative_prompt_attention_mask": ((None,), "guidance runs the model a second time behind our back"),
    "custom_generate": ((None,), "mtpdecode takes its place"),
    "token_healing": ((None, False), "it rewrites the prompt"),
    "assistant_model": ((None,), "the model's own head drafts here"),
    "prompt_lookup_num_tokens": ((None,), "pass proposer=NGramProposer() to MTPDecoder.from_model instead"),
    "use_mtp": ((None, False), "mtpdecode takes its place"),
    "assistant_early_exit": ((None,), "the model's own head drafts here"),
    "cache": ((None,), "mtpdecode keeps its own caches; pass the whole text as input_ids"),
    "past_key_values": ((None,), "mtpdecode keeps its own caches; pass the whole text as input_ids"),
    "cache_implementation": ((None,), "mtpdecode keeps its own caches; pass cache=RaggedCache or CropCache to from_model"),
    "use_cache": ((None, True), "speculative decoding needs a cache"),
    "position_ids": ((None,), "positions follow from attention_mask"),
    "output_attentions": ((None, False), "attentions are not collected"),
    "output_hidden_states": ((None, False), "hidden states are not collected"),
    "output_scores": ((None, False), "scores are not collected"),
    "output_logits": ((None, False), "logits are not collected"),
    "synced_gpus": ((None, False), "one process decodes here"),
    "stop_strings_tokenizer": ((None,), "pass tokenizer="),
}
"""Options of `model.generate` that we do not honour: the values that mean "off", and why or what instead."""

OURS = ("seed", "num_speculative_tokens", "draft_sampling", "acceptance")


class Request(NamedTuple):
    """A call of `generate`, in tensors.

    input_ids  (B, P) as given, padding included: the beginning of the result
    pad_id     fills rows that end early
    """

    input_ids: Tensor
    prompt: Prompt
    text: Text
    stopping: Stopping
    processors: Sequence[LogitsProcessor]
    padding: list[int]
    pad_id: int
    config: GenerationConfig
    streamer: BaseStreamer | None

    def sequences(self, rows: list[list[int]]) -> Tensor:
        """New tokens per row -> (B, P + n) int64, as `model.generate` returns them."""
        width = max(map(len, rows))
        new = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in rows], device=self.input_ids.device)
        return torch.cat([self.input_ids.long(), new.view(len(rows), width)], dim=1)

    def as_given(self, kwargs: Mapping[str, Any]) -> Request:
        """With the prompt as the user gave it, where it was padded on the right (see `left_padded`)."""
        ids, num_rows = kwargs.get("input_ids"), self.input_ids.shape[0]
        if ids is None or kwargs.get("inputs_embeds") is not None:
            return self
        return self._replace(input_ids=ids.to(self.input_ids.device).repeat_interleave(num_rows // ids.shape[0], dim=0))


def check_keywords(model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Raise GenerationError for an unknown keyword, naming the nearest known one, and for options that are not ours."""
    signature = inspect.signature(GenerationMixin.generate).parameters
    known = {*signature, *_config_fields(), *INPUTS, *OURS, *NOT_OURS, *prompt_keywords(model), "tokenizer"} - {"self", "kwargs"}
    for name in given:
        if name not in known:
            _refuse_unread(model, name, given[name])
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean {nearest[0]!r}?" if nearest else "It takes what model.generate takes."
            raise GenerationError(f"generate() got an unknown keyword {name!r}. {hint}")
    check_options(given)


def _refuse_unread(model: PreTrainedModel, name: str, value: Any) -> None:
    if name in forward_keywords(model) | {"mm_encoder_outputs"}:
        raise GenerationError(
            f"{name}={type(value).__name__} was given; how {type(model).__name__} reads it is not known to be exact here. "
            "Leave it out, or call model.generate() without mtpdecode."
        )


def _config_fields() -> dict[str, Any]:
    return dict(GenerationConfig().to_dict())


def check_options(given: Mapping[str, Any]) -> None:
    """Raise GenerationError for the first option in `given` that we do not honour and that is not off."""
    for name, (off, why) in NOT_OURS.items():
        value = given.get(name)
        if not any(value is neutral or (isinstance(value, (int, float)) and value == neutral) for neutral in off):
            shown = value if isinstance(value, (int, float, str)) else type(value).__name__
            raise GenerationError(
                f"{name}={shown} was asked for; {why}. Leave it out, or call model.generate() without mtpdecode."
            )


def check_prepared(config: GenerationConfig, own: GenerationConfig) -> None:
    """`check_options` on what transformers prepared. A cache that the model's own generation config names was not asked for."""
    options = config.to_dict()
    if options.get("cache_implementation") == own.cache_implementation:
        options.pop("cache_implementation", None)
    check_options(options)


def check_seam(model: PreTrainedModel, model_kwargs: Mapping[str, Any]) -> None:
    """Raise GenerationError for what a user passed to `model.generate(..., custom_generate=decoder)` and we would not look at."""
    caches = {name: model_kwargs[name] for name in CACHE_NAMES if model_kwargs.get(name) is not None}
    check_options({name: cache for name, cache in caches.items() if int(cache.get_seq_length())})
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if positions is not None:
        positions = positions[0] if positions.dim() == 3 else positions  # the first are those of text
        seen = torch.ones_like(positions) if mask is None else mask.long()
        if bool(((seen.cumsum(-1) - 1 != positions) & seen.bool()).any()):
            check_options({"position_ids": positions})
    for name in set(model_kwargs) - set(PREPARED) - prompt_keywords(model):
        if not _is_nothing(model_kwargs[name]):
            _refuse_unread(model, name, model_kwargs[name])
            raise GenerationError(f"generate() got {name!r}, which mtpdecode does not hand to the model. Leave it out.")


def _is_nothing(value: Any) -> bool:
    """Whether a model would do the same without: transformers hands {} to models that could have been given images."""
    return value is None or (isinstance(value, Mapping) and not value)


def check_inputs(model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Raise GenerationError for prompts that are empty, of a wrong type or shape, outside the vocabulary or too long."""
    ids, mask, embeds = (given.get(name) for name in INPUTS)
    if ids is None and embeds is None:
        raise GenerationError(
            "generate() was called without a prompt. Pass input_ids (B, P), or **tokenizer(text, return_tensors='pt')."
        )
    for name, tensor, num_axes in (("input_ids", ids, 2), ("inputs_embeds", embeds, 3), ("attention_mask", mask, 2)):
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.dim() != num_axes):
            found = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise GenerationError(
                f"{name} must be a tensor with {num_axes} axes, (B, P{', D' * (num_axes == 3)}); found {found}. "
                f"Pass what tokenizer(texts, return_tensors='pt') gives, or {name}[None] for a single row."
            )
    prompt: Any = ids if embeds is None else embeds
    if 0 in prompt.shape[:2]:
        raise GenerationError(f"The prompt is empty: shape {tuple(prompt.shape)}. Pass at least one row of at least one token.")
    if ids is not None and embeds is None:
        _check_ids(model, ids)
    if mask is not None:
        _check_mask(mask, prompt.shape[:2])
    _check_length(model, prompt.shape[1] if mask is None else int(mask.sum(-1).max()))


def _check_ids(model: PreTrainedModel, ids: Tensor) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise GenerationError(f"input_ids must hold integers; found {ids.dtype}. Pass token ids, as a tokenizer gives them.")
    embedding: Any = model.get_input_embeddings()
    size = embedding.weight.shape[0]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise GenerationError(
            f"input_ids must lie in 0..{size - 1}, the model's vocabulary; found {low if low < 0 else high}. "
            "Pass ids of the model's own tokenizer."
        )


def _check_mask(mask: Tensor, shape: Sequence[int]) -> None:
    if tuple(mask.shape) != tuple(shape):
        raise GenerationError(
            f"attention_mask must have the prompt's shape {tuple(shape)}; found {tuple(mask.shape)}. "
            "Pass the mask that the tokenizer gave with these ids, or none where nothing is padded."
        )
    seen = mask.bool().long()
    if not bool(seen.sum(-1).all()):
        raise GenerationError(
            f"attention_mask hides all of row {int(seen.sum(-1).argmin())}; every row needs a token. Leave that row out."
        )
    if int(seen.diff(dim=-1).abs().sum(-1).max()) > 2 or bool(
        ((seen.diff(dim=-1) != 0).sum(-1) == 2).logical_and(seen[:, 0] == 1).any()
    ):
        raise GenerationError(
            "attention_mask has a hole; a row's tokens must stand together, with padding on the left or the right."
        )


def _check_length(model: PreTrainedModel, length: int) -> None:
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is not None and length >= limit:
        raise GenerationError(f"The prompt has {length} tokens; the model has {limit} positions. Shorten the prompt.")


def request_from(
    model: PreTrainedModel,
    input_ids: Tensor,
    model_kwargs: Mapping[str, Any],
    processors: Sequence[LogitsProcessor],
    criteria: Sequence[StoppingCriteria],
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    overhang: int,
) -> Request:
    """Put what transformers prepared in our terms. overhang: slots of text to have past the longest row."""
    inputs_embeds, attention_mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    shown = input_ids if inputs_embeds is None else inputs_embeds
    mask = (
        torch.ones(shown.shape[:2], dtype=torch.long, device=shown.device)
        if attention_mask is None
        else attention_mask.bool().long()
    )
    _check_mask(mask, shown.shape[:2])  # transformers makes one itself where a prompt without a mask holds the padding token
    prompt = _left_aligned(model, input_ids, mask, model_kwargs)
    _check_last(model, prompt)
    budget = min([config.max_length, *(c.max_length for c in criteria if isinstance(c, MaxLengthCriteria))]) - input_ids.shape[1]
    room = prompt.tokens.new_zeros(prompt.tokens.shape[0], budget + overhang)
    hidden = inputs_embeds is not None and input_ids.shape[1] == 0
    starts = prompt.lengths if hidden else torch.zeros_like(prompt.lengths)
    text = Text(torch.cat([prompt.tokens, room], dim=1), prompt.lengths, starts)
    pad = config._pad_token_tensor
    return Request(
        input_ids,
        prompt,
        text,
        Stopping(_eos_ids(criteria, mask.device), prompt.lengths + budget, _others(criteria)),
        processors,
        (shown.shape[1] - prompt.lengths).tolist(),
        int(pad) if pad is not None else 0,
        config,
        streamer,
    )


def _left_aligned(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, model_kwargs: Mapping[str, Any]) -> Prompt:
    """
    ids  . . a b    mask 0 0 1 1          a b . .      lengths 2
         c d e f         1 1 1 1    ->    c d e f              4
    """
    order = (1 - mask).argsort(dim=-1, stable=True)
    tokens = (input_ids.long() * mask).gather(1, order) if input_ids.shape[1] else torch.zeros_like(order)
    given = {name: model_kwargs[name] for name in prompt_keywords(model) if not _is_nothing(model_kwargs.get(name))}
    types = _reordered(given["mm_token_type_ids"] * mask, order) if "mm_token_type_ids" in given else None
    media = {name: value for name, value in given.items() if name not in PER_TOKEN}
    if media and merges_media(model):
        embeds = merged_embeddings(model, input_ids, media)
        return Prompt(tokens, mask.sum(-1), embeds=_reordered(embeds, order), axes=_axes(model, model_kwargs, order))
    prompt = Prompt(tokens, mask.sum(-1), types=types, media=media)
    if model_kwargs.get("inputs_embeds") is None:
        return prompt
    prompt = prompt._replace(embeds=_reordered(model_kwargs["inputs_embeds"], order))
    if "per_layer_inputs" in given:
        return prompt._replace(per_layer=_reordered(given["per_layer_inputs"], order))
    return prompt._replace(per_layer=_looked_up(model, prompt)) if has_per_layer_inputs(model) else prompt


def _axes(model: PreTrainedModel, model_kwargs: Mapping[str, Any], order: Tensor) -> Tensor | None:
    """(3, B, P) the positions that transformers found for a prompt, behind those of text; None for models without such axes."""
    if not has_axes(model):
        return None
    return model_kwargs["position_ids"][1:].gather(2, order.expand(3, -1, -1))  # type: ignore[no-any-return]


def _looked_up(model: PreTrainedModel, prompt: Prompt) -> Tensor:
    """(B, P, L, d), found by the prompt's embeddings as the model itself does it; padding counts as token 0."""
    slots = torch.arange(prompt.tokens.shape[1], device=prompt.tokens.device).expand_as(prompt.tokens)
    shown = prompt.inputs(embedded(model, torch.zeros_like(prompt.tokens)), slots)["inputs_embeds"]
    try:
        return per_layer_inputs(model, shown)
    except RuntimeError as error:
        raise GenerationError(
            f"inputs_embeds was given; {type(model).__name__} has an embedding per layer, looked up by token, and some of these "
            "embeddings are no token's. Pass per_layer_inputs= besides, or input_ids with pixel_values and the like."
        ) from error


def _check_last(model: PreTrainedModel, prompt: Prompt) -> None:
    """Raise GenerationError for a prompt that ends in an image: the last token is read on its own, with what is drafted."""
    if not prompt.is_whole:
        return
    last = prompt.lengths[:, None] - 1
    ends = torch.isin(prompt.tokens.gather(1, last), torch.tensor(placeholders(model), device=last.device))
    if prompt.types is not None:
        ends |= prompt.types.gather(1, last) != 0
    if bool(ends.any()):
        raise GenerationError(
            f"Row {int(ends[:, 0].int().argmax())} of the prompt ends in an image, a video or a sound; it must end in text. "
            "Let the tokenizer's chat template close it, or append a token."
        )


def _eos_ids(criteria: Sequence[StoppingCriteria], device: torch.device) -> Tensor:
    ids = [c.eos_token_id.flatten().to(device) for c in criteria if isinstance(c, EosTokenCriteria)]
    return torch.cat(ids) if ids else torch.zeros(0, dtype=torch.long, device=device)


def _others(criteria: Sequence[StoppingCriteria]) -> list[StoppingCriteria]:
    return [c for c in criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]


def left_padded(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same call with padding on the left: the side that transformers takes without a warning."""
    mask = kwargs.get("attention_mask")
    if mask is None or bool(mask[:, -1].all()):
        return dict(kwargs)
    order = mask.long().argsort(dim=-1, stable=True)
    given = [name for name in ("attention_mask", *PER_TOKEN) if kwargs.get(name) is not None]
    return kwargs | {name: _reordered(kwargs[name], order) for name in given}


def _reordered(given: Tensor, order: Tensor) -> Tensor:
    """given (B, P, ...), in every row in the order (B, P)."""
    return given[torch.arange(len(order), device=given.device)[:, None], order.to(given.device)]


def without_text_types(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same call without an mm_token_type_ids that says of every token that it is text, as processors give it."""
    types = kwargs.get("mm_token_type_ids")
    if isinstance(types, Tensor) and not bool(types.any()):
        return {name: value for name, value in kwargs.items() if name != "mm_token_type_ids"}
    return kwargs


def seeds_for(seed: int | Sequence[int] | None, like: Tensor) -> Tensor:
    """(B,) int64. None: from torch's own generator, so torch.manual_seed holds; an int: a stream per row, that of row 0 being the
    one that [seed] gives to a row alone; a list: a seed per row."""
    num_rows = like.shape[0]
    if not (seed is None or _is_int(seed) or (isinstance(seed, Sequence) and all(map(_is_int, seed)))):
        raise GenerationError(f"seed={seed!r} was asked for. Pass one int, or a list of one int per row.")
    if seed is None:
        return torch.randint(2**62, (num_rows,), device="cpu").to(like.device)
    if isinstance(seed, int):
        return _scaled(seed, like) + torch.arange(num_rows, device=like.device)
    if len(seed) != num_rows:
        raise GenerationError(f"seed holds {len(seed)} numbers; the batch has {num_rows} rows. Pass one int, or one per row.")
    return torch.stack([_scaled(each, like) for each in seed])


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _scaled(seed: int, like: Tensor) -> Tensor:
    return torch.tensor((int(seed) % 2**39) << 24, device=like.device)
