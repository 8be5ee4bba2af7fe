"""Gemma 4's assistants: small checkpoints of their own, whose layers have no keys and read those of the target."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .cache import CacheLayout, KVCacheManager
from .checkpoint import Checkpoint, fitted
from .errors import HeadWeightsError, UnsupportedModelError
from .families import FAMILIES, spec_for
from .layers import check_attention, layer_windows, num_own_layers
from .proposer import Call, Proposer, drawn, joined, last_real
from .spec import MTPSpec
from .state import DecodeState, Draft, Noise
from .target import decoder_of, final_norm_of, rotary_of, text_config

COPIES = ("lm_head.weight",)
"""Tensors that repeat others of the same checkpoint."""

NUM_TOKENS = 3
"""K where a checkpoint does not say what suits it."""


class Origin(NamedTuple):
    """Where an assistant comes from: a name for messages, its config.json, its tensors, and its generation_config.json."""

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    generation: Mapping[str, Any]


class Seen(NamedTuple):
    """What all draft steps of a round look at: the target's keys and values, up to the last position that it has written.

        target's keys   a b c d      pending  e      every step stands at the position of d and sees a b c d

    keys    layer type -> keys, values (B, H, S, Dh)        masks   layer type -> (B, 1, 1, S)
    angles  layer type -> cosines, sines (B, 1, Dh)
    """

    keys: dict[str, tuple[Tensor, Tensor]]
    masks: dict[str, Tensor]
    angles: dict[str, tuple[Tensor, Tensor]]


class Shared(NamedTuple):
    """What an assistant uses of its target and does not own. producers: layer type -> the target's layer whose keys are read."""

    embedding: nn.Module
    config: PreTrainedConfig
    producers: dict[str, int]


class CentroidHead(nn.Module):
    """Finds the tokens worth scoring: those that belong to the likeliest centroids.

    token_ordering  (V,) int64: the tokens, centroid by centroid
    """

    token_ordering: Tensor

    def __init__(self, size: int, vocab_size: int, num_centroids: int, num_chosen: int) -> None:
        super().__init__()
        self.num_chosen = num_chosen
        self.centroids = nn.Linear(size, num_centroids, bias=False)
        self.register_buffer("token_ordering", torch.arange(vocab_size))

    def forward(self, states: Tensor) -> Tensor:
        """states (B, D) -> token ids (B, n)."""
        chosen = self.centroids(states).topk(self.num_chosen, dim=-1).indices
        return self.token_ordering.view(self.centroids.out_features, -1)[chosen].flatten(1)


class Body(nn.Module):
    """What the checkpoint has under `model.`; embed_tokens is the output layer, for the embedding of tokens is the target's."""

    def __init__(self, embed_tokens: nn.Embedding, layers: nn.ModuleList, norm: nn.Module) -> None:
        super().__init__()
        self.embed_tokens, self.layers, self.norm = embed_tokens, layers, norm


class Assistant(nn.Module):
    """Drafts for a target by reading its keys and values; its modules are named as in its checkpoint.

        x = pre_projection(concat(e, h))        z = norm(layers(x))        logits = head(z)        next h = post_projection(z)

    e is the target's embedding of the last token, h its hidden state one place before, then what was recycled.

    suppressed  (n,) int64, the tokens that it never drafts
    """

    suppressed: Tensor

    def __init__(self, target: PreTrainedModel, spec: MTPSpec, config: Mapping[str, Any]) -> None:
        super().__init__()
        own, theirs = _reading_config(target, config), text_config(target)
        self.spec, self.config, self.backbone_size = spec, own, int(config["backbone_hidden_size"])
        self.num_layers, size = own.num_hidden_layers // 2, own.hidden_size
        self.num_speculative_tokens = NUM_TOKENS
        self.register_buffer("suppressed", torch.zeros(0, dtype=torch.long), persistent=False)
        producers = _producers(target)
        self.pre_projection = nn.Linear(2 * self.backbone_size, size, bias=False)
        self.post_projection = nn.Linear(size, self.backbone_size, bias=False)
        layer: Any = type(decoder_of(target).layers[0])
        norm: Any = type(final_norm_of(target))
        rotary: Any = type(rotary_of(target))
        layers = nn.ModuleList(layer(own, self.num_layers + index) for index in range(self.num_layers))
        self.model = Body(nn.Embedding(own.vocab_size, size), layers, norm(size, eps=own.rms_norm_eps))
        self.masked_embedding = _centroid_head(config, own)
        weight = target.get_output_embeddings().weight
        self.to(device=weight.device, dtype=weight.dtype)
        self._shared = [Shared(target.get_input_embeddings(), theirs, producers)]  # in a list: not a submodule
        self._rotary = [rotary(own).to(weight.device)]
        self.requires_grad_(False).eval()

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T, D), the target's own embedding, scaled as the target scales it."""
        return self._shared[0].embedding(tokens)  # type: ignore[no-any-return]

    def layout(self, dtype: torch.dtype) -> CacheLayout:
        """How the target's keys are seen from here: with this model's windows, and the attention that the target runs now."""
        self.config._attn_implementation = self._shared[0].config._attn_implementation
        return CacheLayout(layer_windows(self.config, "The assistant"), check_attention(self.config, "The assistant"), dtype)

    def look(self, past: KVCacheManager, layout: CacheLayout) -> Seen | None:
        """What this round's draft steps see; None while the target has written nothing."""
        kept = {kind: past.kept(index) for kind, index in self._shared[0].producers.items()}
        keys = {kind: pair for kind, pair in kept.items() if pair is not None}
        if not keys:
            return None
        positions = (past.lengths - 1).clamp(min=0)[:, None]
        masks = layout.mask(positions, next(iter(keys.values()))[0].shape[2])
        by_kind = masks if isinstance(masks, dict) else dict.fromkeys(layout.windows, masks)
        shown = {kind: mask for kind, mask in by_kind.items() if mask is not None}
        return Seen(keys, shown, {kind: self._rotary[0](self.pre_projection.weight, positions, kind) for kind in shown})

    def forward(self, embeds: Tensor, hidden: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """embeds, hidden (B, 1, D) -> logits (B, V), what the next draft step is fed (B, 1, D)."""
        x = self.pre_projection(torch.cat([embeds, hidden], dim=-1))
        for layer, kind in zip(self.model.layers, self.config.layer_types[self.num_layers :], strict=True):
            x = layer(x, shared_kv_states=seen.keys, position_embeddings=seen.angles[kind], attention_mask=seen.masks[kind])
        normed = self.model.norm(x)
        return self.logits(normed[:, 0]), self.post_projection(normed)

    def logits(self, normed: Tensor) -> Tensor:
        """normed (B, D) -> (B, V); -inf for tokens of centroids that were not chosen, and for suppressed ones: their q is 0."""
        weight, ids = self.model.embed_tokens.weight, None
        if self.masked_embedding is None:
            scores = F.linear(normed, weight)
        else:
            ids = self.masked_embedding(normed)
            scores = (weight[ids] @ normed[..., None])[..., 0]
        cap = self.config.final_logit_softcapping
        scores = scores if cap is None else torch.tanh(scores / cap) * cap
        if ids is not None:
            scores = scores.new_full((len(ids), self.config.vocab_size), float("-inf")).scatter(1, ids, scores)
        allowed = scores.index_fill(-1, self.suppressed, float("-inf"))
        return torch.where(allowed.isfinite().any(-1, keepdim=True), allowed, scores)


class AssistantProposer(Proposer):
    """Drafts with an assistant: no cache of its own, no prefill, nothing to put right after a refusal.

    text    a b c d e        the target's keys  a b c d, its hidden state h of d; e pending
    drafts  x from (e, h)    y from (x, what was recycled)    ...    all from the position of d
    """

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant

    def begin(self, call: Call, cache: KVCacheManager | None) -> None:
        assert call.past is not None
        self.call, self.past = call, call.past
        self.layout = self.assistant.layout(self.assistant.pre_projection.weight.dtype)

    def propose(self, state: DecodeState, num_speculative_tokens: int, noise: Noise) -> Draft:
        text, picks = state.text, []
        tokens, hidden = text.at(text.lengths[:, None] - 1), last_real(state.fresh.states, state.fresh.counts)
        seen = self.assistant.look(self.past, self.layout)
        if seen is None:  # one-token prompts, which leave nothing to look at: any guess will do
            return Draft(tokens.expand(-1, num_speculative_tokens), None)
        for step in range(num_speculative_tokens):
            logits, hidden = self.assistant(self.assistant.embed(tokens), hidden, seen)
            picks.append(drawn(logits.float(), self.call, text, step, noise))
            tokens = picks[-1].tokens
            text = text.with_draft(tokens, step)
        return joined(picks, state)


def assistant_for(target: PreTrainedModel, source: Assistant | PreTrainedModel | str | os.PathLike[str]) -> Assistant:
    """The assistant of a target: one in memory, transformers' own, or read from a folder or repository.

    Raises UnsupportedModelError where the target has none or the source is none, HeadWeightsError where the two do not fit.
    """
    spec = spec_for(text_config(target).model_type, type(target).__name__)
    if spec.kv != "target":
        raise UnsupportedModelError(
            f"assistant= was given; {type(target).__name__} drafts with a head of its own, of family {spec.family}. "
            "Leave it out, or pass head='FOLDER/OR/REPOSITORY' to take the head from elsewhere."
        )
    if isinstance(source, Assistant):
        _check_fit(target, source.config, source.backbone_size, "The assistant in memory")
        return source
    origin = _origin(source, spec)
    if origin.config.get("model_type") not in spec.assistants:
        raise UnsupportedModelError(
            f"{origin.name} was given as assistant; its model_type is {origin.config.get('model_type')!r}, and "
            f"{type(target).__name__} drafts with {' or '.join(spec.assistants)}: a checkpoint that reads the target's keys, "
            f"such as {spec.examples[0]!r}. For another draft model, call model.generate(assistant_model=...) without mtpdecode."
        )
    return _built(target, spec, origin)


def is_assistant(source: str | os.PathLike[str]) -> bool:
    """Whether a folder or repository holds an assistant of some family. Raises CheckpointError where it holds nothing."""
    model_type = Checkpoint(source).config.get("model_type")
    return any(model_type in row.assistants for row in FAMILIES)


def _built(target: PreTrainedModel, spec: MTPSpec, origin: Origin) -> Assistant:
    _check_fit(target, _reading_config(target, origin.config), int(origin.config["backbone_hidden_size"]), origin.name)
    assistant = Assistant(target, spec, origin.config)
    tensors = fitted(origin.name, assistant.state_dict(), origin.tensors, COPIES)
    _check_ordering(origin.name, tensors.get("masked_embedding.token_ordering"))
    assistant.load_state_dict(tensors)
    assistant.num_speculative_tokens = int(origin.generation.get("num_assistant_tokens") or NUM_TOKENS)
    suppressed = list(origin.generation.get("suppress_tokens") or ())
    assistant.suppressed = torch.tensor(suppressed, dtype=torch.long, device=assistant.suppressed.device)
    return assistant


def _origin(source: PreTrainedModel | str | os.PathLike[str], spec: MTPSpec) -> Origin:
    if isinstance(source, PreTrainedModel):
        said = source.generation_config.to_diff_dict() if source.generation_config is not None else {}
        return Origin(type(source).__name__, source.config.to_dict(), source.state_dict(), said)
    if not isinstance(source, (str, os.PathLike)):
        raise UnsupportedModelError(
            f"assistant={type(source).__name__} was given; it must be a folder, a repository or a loaded assistant. "
            f"Pass assistant={spec.examples[0]!r}."
        )
    checkpoint = Checkpoint(source)
    tensors = checkpoint.read(checkpoint.files) if checkpoint.config.get("model_type") in spec.assistants else {}
    return Origin(repr(checkpoint.source), checkpoint.config, tensors, checkpoint.optional("generation_config.json"))


def _reading_config(target: PreTrainedModel, config: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a model of the target's class whose first half has keys, and whose second half, the assistant, reads them.

    transformers asks of every layer that reads keys that a layer before it has some; here those are the target's.
    """
    kind, text = type(text_config(target)), dict(config.get("text_config") or {})
    alone = kind.from_dict(text | {"num_kv_shared_layers": 0})
    num_layers = alone.num_hidden_layers
    twice = {"num_hidden_layers": 2 * num_layers, "num_kv_shared_layers": num_layers, "layer_types": alone.layer_types * 2}
    per_layer = text.get("per_layer_config") or {}
    if per_layer:
        twice["per_layer_config"] = {str(int(i) + start): per_layer[i] for i in per_layer for start in (0, num_layers)}
    own = kind.from_dict(text | twice)
    own._attn_implementation = text_config(target)._attn_implementation
    return own


def _producers(target: PreTrainedModel) -> dict[str, int]:
    """Layer type -> the target's last layer of that type that has keys of its own."""
    config = text_config(target)
    num_own = num_own_layers(config, type(target).__name__)
    return {kind: index for index, kind in enumerate(config.layer_types[:num_own])}


def _check_fit(target: PreTrainedModel, own: PreTrainedConfig, backbone_size: int, name: str) -> None:
    """Raise HeadWeightsError where an assistant was made for a target of other sizes."""
    theirs, producers = text_config(target), _producers(target)
    wanted = {"hidden states of size": (backbone_size, theirs.hidden_size), "tokens": (own.vocab_size, theirs.vocab_size)}
    for index, kind in enumerate(own.layer_types[: own.num_hidden_layers // 2]):
        if kind not in producers:
            wanted[f"{kind} layers"] = (1, 0)
            continue
        ours, source = own.per_layer_config[index], theirs.per_layer_config[producers[kind]]
        wanted[f"key heads in {kind} layers"] = (ours.num_key_value_heads, source.num_key_value_heads)
        wanted[f"numbers per key in {kind} layers"] = (ours.head_dim, source.head_dim)
    wrong = [f"{what}: {found}, where the target has {is_}" for what, (found, is_) in wanted.items() if found != is_]
    if wrong:
        raise HeadWeightsError(
            f"{name} was given as assistant of {type(target).__name__}; it was made for another target ({'; '.join(wrong)}). "
            "Pass the assistant that is published with this model."
        )


def _centroid_head(config: Mapping[str, Any], own: PreTrainedConfig) -> CentroidHead | None:
    if not config.get("use_ordered_embeddings"):
        return None
    num_centroids, num_chosen = int(config.get("num_centroids", 2048)), int(config.get("centroid_intermediate_top_k", 32))
    if own.vocab_size % num_centroids or num_chosen > num_centroids:
        raise HeadWeightsError(
            f"The assistant's config has {num_centroids} centroids for {own.vocab_size} tokens, of which it takes {num_chosen}; "
            "each must have equally many tokens, and there must be as many as it takes. Download the assistant again."
        )
    return CentroidHead(own.hidden_size, own.vocab_size, num_centroids, num_chosen)


def _check_ordering(name: str, ordering: Tensor | None) -> None:
    if ordering is not None and not torch.equal(ordering.long().sort().values.cpu(), torch.arange(len(ordering))):
        raise HeadWeightsError(
            f"{name} was given as assistant; its masked_embedding.token_ordering does not hold every token once. "
            "Download the assistant again."
        )
