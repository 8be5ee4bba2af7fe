"""The target's parts that we use, and its forward pass over a window. The model itself is never changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel

from .distances import Places
from .errors import UnsupportedModelError
from .recurrent import listening
from .state import Window

MIXERS = ("hc_head", "hyper_connection_mixer")
"""What models with several residual streams call the module that makes one state of them."""


FINAL_NORMS = ("norm", "norm_f", "hyper_connection_mixer")
"""What models call the norm before their output layer; in Qwen4-exp the mixer, which norms inside, comes last."""


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


class Tap:
    """Hears the hidden states that a head wants where the model makes them: at its final norm, or at the mixer of its streams."""

    def __init__(self, model: PreTrainedModel, hidden: Hidden) -> None:
        module = mixer_of(model) if hidden == "streams" else final_norm_of(model)
        assert module is not None  # no head that is fed streams can be built for a target without them
        self.module, self.hidden = module, hidden
        self.heard = torch.empty(0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        handle = self.module.register_forward_hook(self._hear)
        try:
            yield
        finally:
            handle.remove()

    def _hear(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.heard = output if self.hidden == "post_norm" else args[0].flatten(2)  # streams one behind the other


CACHE_NAMES = ("cache", "past_key_values")
"""What a forward calls its cache, the newer name first."""


def cache_keyword(forward: Callable[..., Any]) -> str:
    """The name under which a forward takes its cache: "cache" from transformers 5.24 on, "past_key_values" before.

    Published code of the older time keeps that name. A forward that takes everything is handed the name of this transformers.
    """
    names = signature(forward).parameters
    ours = next((name for name in CACHE_NAMES if name in names), None)
    return ours or cache_keyword(GenerationMixin.prepare_inputs_for_generation)


class Ears:
    """All that follows what a target does in a window: the head's tap, the layers of the cache, what is told of distances.

    The hooks live as long as somebody listens: for one forward pass, or for a whole round, which can then be one graph. The model
    is as it was before and after.
    """

    def __init__(self, model: PreTrainedModel, hidden: Hidden) -> None:
        self.tap, self.places = Tap(model, hidden), Places(decoder_of(model).layers)
        self.cache_keyword = cache_keyword(model.forward)
        self.cache: Cache | None = None

    @contextmanager
    def listening(self, cache: Cache) -> Iterator[None]:
        """In here windows of this cache are followed."""
        with self.tap.listening(), self.places.listening(), listening(cache):
            self.cache = cache
            try:
                yield
            finally:
                self.cache = None


def forward(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    window: Window,
    num_logits: int,
    hidden: Hidden | Ears,
    extra: Mapping[str, Any] | None = None,
) -> TargetOutput:
    """One forward pass over a window. inputs: {"input_ids": (B, T)} or {"inputs_embeds": (B, T, D)}.

    hidden  which hidden states are wanted, or the ears that hear them
    """
    ears = hidden if isinstance(hidden, Ears) else Ears(model, hidden)
    if ears.cache is not window.cache:
        with ears.listening(window.cache):
            return forward(model, inputs, window, num_logits, ears, extra)
    ears.places.tell(window.positions)
    num_tokens = window.positions.shape[1]
    kept = torch.arange(num_tokens - num_logits, num_tokens, device=window.positions.device)
    logits = model(
        **inputs,
        **(extra or {}),
        attention_mask=window.mask,
        position_ids=window.positions if window.axes is None else window.axes,
        **{ears.cache_keyword: window.cache},
        use_cache=True,
        logits_to_keep=kept,  # as places: for a mere number Gemma 4 drops the other hidden states too
    ).logits
    return TargetOutput(logits, ears.tap.heard)


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
