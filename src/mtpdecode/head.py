"""A family's MTP head, built from its row of the table and the target's own layer class."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .blocks import HalfLayer, PlainLayer, SubLayers, num_streams, own_mixer, rotary_angles, stream_norms, sublayer_kinds
from .distances import Places
from .errors import UnsupportedModelError
from .indexer import shared_indexers
from .layers import MASKS
from .recurrent import kind_of
from .spec import MTPSpec
from .state import Window
from .target import (
    cache_keyword,
    decoder_of,
    embedding_norm_of,
    example_norm_of,
    final_norm_of,
    lm_head_of,
    mixer_of,
    rotary_of,
    text_config,
)

TYPE_NAMES = {"deepseek_sparse_attention": "indexed_attention"}
"""What transformers 5.17 calls layers that rows of the table name as later versions do."""

PER_LAYER = ("layer_types", "mlp_layer_types", "indexer_types")
"""Config fields with one entry a layer."""


class Shared(NamedTuple):
    """The target's modules that a head uses and does not own."""

    embedding: nn.Module
    lm_head: Any
    rotary: nn.Module | None
    norm: nn.Module
    embedding_norm: nn.Module | None


class MTPLayer(nn.Module):
    """One depth: proj(concat of the two norms) -> one decoder layer of the target's class -> norm_out."""

    def __init__(self, target: PreTrainedModel, spec: MTPSpec, config: PreTrainedConfig, index: int) -> None:
        super().__init__()
        norm, size, self.spec = example_norm_of(target), config.hidden_size, spec
        self.num_streams = num_streams(spec, config)
        norms = (fresh_norm(norm), fresh_norm(norm)) if spec.streams is None else stream_norms(fresh_norm(norm), spec, config)
        self.norm_embed, self.norm_hidden = norms
        has_bias = getattr(config, spec.proj_bias) if isinstance(spec.proj_bias, str) else spec.proj_bias
        if spec.combine == "sum":
            self.proj_embed, self.proj_hidden = (nn.Linear(size, size, bias=has_bias) for _ in range(2))
        else:
            self.proj = nn.Linear(2 * size, size, bias=has_bias)
        self.block = _new_block(target, spec, config, index)
        self._cache_keyword = cache_keyword(self.block.forward)
        self.places = Places([self.block])
        types = getattr(config, "layer_types", None) or [""]
        self._layer_type = types[index] if spec.depth_types else types[0]
        rotary = rotary_of(target)
        self._rotary_by_type = rotary is not None and "layer_type" in signature(rotary.forward).parameters
        if spec.streams is not None:
            self.mixer = own_mixer(mixer_of(target), spec)
        if spec.norm_out == "own":
            self.norm_out = fresh_norm(norm)
        if spec.lm_head == "own":
            self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        if spec.embedding == "own":
            self.embedding = nn.Embedding(config.vocab_size, size)

    def forward(self, embeds: Tensor, hidden: Tensor, window: Window, shared: Shared) -> tuple[Tensor, Tensor]:
        """embeds, hidden (B, T, D) -> (what the output layer reads, what the next draft step is fed), (B, T, D) each.

        With several residual streams, hidden and what the next draft step is fed are (B, T, streams * D).
        """
        if not self.places.is_listening:
            with self.places.listening():
                return self.forward(embeds, hidden, window, shared)
        self.places.tell(window.positions)
        if self.spec.zero_first_embedding:
            embeds = embeds.masked_fill((window.positions == 0)[..., None], 0.0)
        x = self._fused(embeds, hidden)
        raw = self.block(
            self._apart(x),
            attention_mask=self._mask(window),
            position_ids=window.positions,
            **{self._cache_keyword: window.cache},
            use_cache=True,
            position_embeddings=self._rotated(x, window, shared.rotary),
        )
        raw = (raw[0] if isinstance(raw, tuple) else raw).flatten(2)  # some layers return what they looked at as well
        normed = self._normed(raw, shared)
        return normed, normed if self.spec.recycle == "normed" else raw

    def _mask(self, window: Window) -> Any:
        """The mask of the block's own attention, where depths of several types, or convolutions, have one each."""
        name = MASKS.get(self._layer_type, self._layer_type)
        return window.mask[name] if isinstance(window.mask, dict) and name in window.mask else window.mask

    def _fused(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """embeds (B, T, D), hidden (B, T, D) -> (B, T, D); or of every stream, one behind the other."""
        if self.spec.combine == "sum":
            embeds = self.proj_embed(self.norm_embed(embeds))
            streams: Tensor = self.proj_hidden(self._normed_streams(hidden))
            return (streams + embeds[..., None, :]).flatten(2)
        pair = [self.norm_embed(embeds), self.norm_hidden(hidden)]
        return self.proj(torch.cat(pair if self.spec.combine == "embed_hidden" else pair[::-1], dim=-1))  # type: ignore[no-any-return]

    def _normed_streams(self, hidden: Tensor) -> Tensor:
        """hidden (B, T, streams * D) -> (B, T, streams, D)"""
        if self.spec.stream_norm == "each":
            return self.norm_hidden(self._split(hidden))  # type: ignore[no-any-return]
        return self._split(self.norm_hidden(hidden))

    def _split(self, streams: Tensor) -> Tensor:
        """(B, T, streams * D) -> (B, T, streams, D)"""
        return streams.view(*streams.shape[:-1], self.num_streams, -1)

    def _apart(self, x: Tensor) -> Tensor:
        """x (B, T, streams * D), with an axis for streams if the target's modules want one."""
        return self._split(x) if self.spec.stream_axis else x

    def _rotated(self, x: Tensor, window: Window, rotary: nn.Module | None) -> Any:
        """The rotary angles, of the block's own layer type where the target's types differ in them; None without positions."""
        if rotary is None:
            return None
        if self.spec.angles != "window":
            return rotary_angles(rotary, self.spec, x, window)
        return rotary(x, window.positions, self._layer_type) if self._rotary_by_type else rotary(x, window.positions)

    def _normed(self, raw: Tensor, shared: Shared) -> Tensor:
        if self.spec.streams is not None:
            raw = self.mixer(self._apart(raw))
        if self.spec.norm_out == "none":
            return raw
        return self.norm_out(raw) if self.spec.norm_out == "own" else shared.norm(raw)  # type: ignore[no-any-return]


class MTPHead(nn.Module):
    """A native multi-token-prediction head: `num_layers` depths around one target.

    draft_vocabulary        (V_draft,) int64: the ids over which the head drafts; None: all. Only q changes: any list is lossless
    num_speculative_tokens  the K that suits the head: its number of layers, unless it was trained for more

    The target's embedding and output layer are used, not owned: they are in no state dict of the head and never move with it.
    """

    draft_vocabulary: Tensor | None

    def __init__(
        self, target: PreTrainedModel, spec: MTPSpec, num_layers: int = 1, draft_vocabulary: Tensor | None = None
    ) -> None:
        super().__init__()
        decoder, spec = decoder_of(target), spec.fitted(text_config(target))
        self.spec, self.config = spec, head_config(target, spec, num_layers)
        self.num_speculative_tokens = num_layers
        embedding, lm_head = target.get_input_embeddings(), lm_head_of(target)
        norms = (final_norm_of(target), embedding_norm_of(target))
        self._shared = [Shared(embedding, lm_head, rotary_of(target), *norms)]  # in a list: not a submodule
        self.layers = nn.ModuleList([MTPLayer(target, spec, self.config, index) for index in range(num_layers)])
        self.indexers = shared_indexers((layer.block for layer in self.layers), spec, self.config)  # type: ignore[misc]
        self._share_parts()
        weight = lm_head.weight
        usual = next(embedding.parameters()).dtype  # not the output layer's, which some models keep in float32
        self.to(device=weight.device, dtype=usual)
        origins = decoder.layers if spec.sublayers else [decoder.layers[self.config.block_origin]]
        for layer in self.layers:
            _restore_dtypes(layer.block, origins, usual)  # type: ignore[arg-type]
            if spec.streams is not None:
                _restore_dtypes(layer.mixer, [own_mixer(mixer_of(target), spec)], usual)  # type: ignore[arg-type]
        self._restrict(draft_vocabulary)

    @property
    def num_layers(self) -> int:
        """How many layers the head has."""
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        """How many tokens the output layer knows; it may be padded to more."""
        unpadded = getattr(self.config, self.spec.vocab_key) if self.spec.vocab_key else None
        return int(self._shared[0].lm_head.weight.shape[0] if unpadded is None else unpadded)

    @property
    def width(self) -> int:
        """How many features the hidden states have that the head is fed: D, or those of all residual streams."""
        return int(self.config.hidden_size) * num_streams(self.spec, self.config)

    def num_depths(self, num_speculative_tokens: int) -> int:
        """How long a chain drafts so many tokens; what the chain lacks is drafted with its last layer."""
        longest = num_speculative_tokens if self.spec.beyond == "cycle" else self.spec.used_layers or self.num_layers
        return min(longest, num_speculative_tokens)

    def layer_for(self, step: int) -> int:
        """The layer that takes a draft step."""
        return step % self.num_layers if self.spec.beyond == "cycle" else min(step, self.num_depths(step + 1) - 1)

    @property
    def blocks(self) -> list[nn.Module]:
        """What has a layer of the cache each: the depths' blocks, or where these are rows of layers, all of those."""
        blocks: list[Any] = [layer.block for layer in self.layers]
        rows = [block.layers if isinstance(block, SubLayers) else [block] for block in blocks]
        return [block for row in rows for block in row]

    def num_cached(self, num_speculative_tokens: int) -> int:
        """How many layers the cache has when so many tokens are drafted."""
        return self.num_depths(num_speculative_tokens) * len(self.blocks) // self.num_layers

    @property
    def num_target_layers(self) -> int:
        """How many layers the target has."""
        return self.config.num_target_layers  # type: ignore[no-any-return]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In here depths register no hooks of their own: they are there already."""
        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.enter_context(layer.places.listening())  # type: ignore[union-attr, operator]
            yield

    def restricted(self, draft_vocabulary: Tensor | None) -> MTPHead:
        """The same head, with the same weights, that drafts over draft_vocabulary (n,) int64 only; None: over all ids."""
        head = copy.copy(self)
        head._buffers = dict(self._buffers)
        head._restrict(draft_vocabulary)
        return head

    def _restrict(self, draft_vocabulary: Tensor | None) -> None:
        weight = self._shared[0].lm_head.weight.detach()
        ids = None if draft_vocabulary is None else draft_vocabulary.to(weight.device)
        self.register_buffer("draft_vocabulary", ids, persistent=False)
        self._output = [self._shared[0].lm_head if ids is None else _linear(weight[ids])]  # in a list: not a submodule

    @property
    def drafting(self) -> list[nn.Module]:
        """What a draft goes through: the head, and the output layer that it borrows, restricted to the draft vocabulary."""
        return [self, *(() if self.spec.lm_head == "own" else self._output)]

    def _share_parts(self) -> None:
        """Depths that the checkpoint gives one tensor have one module."""
        first, *others = self.layers
        for part in filter(self.spec.is_shared, self.spec.parts):
            for layer in others:
                setattr(layer, part, getattr(first, part))

    def embed(self, tokens: Tensor, depth: int = 0) -> Tensor:
        """tokens (B, T) -> (B, T, D), the target's own embedding unless the family has another."""
        table = self._shared[0].embedding if self.spec.embedding == "target" else self.layers[depth].embedding
        return table(tokens)  # type: ignore[no-any-return, operator]

    def forward(self, depth: int, embeds: Tensor, hidden: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """One depth over a window: see `MTPLayer.forward`."""
        if norm := self._shared[0].embedding_norm:
            embeds = norm(embeds)
        return self.layers[depth](embeds, hidden, window, self._shared[0])  # type: ignore[no-any-return]

    def scaled(self, normed: Tensor) -> Tensor:
        """normed (..., D), as the output layer reads it."""
        return normed if self.spec.logits_divisor is None else normed / getattr(self.config, self.spec.logits_divisor)

    def logits(self, normed: Tensor, depth: int = 0) -> Tensor:
        """normed (B, D) -> (B, V_draft), over the draft vocabulary."""
        normed = self.scaled(normed)
        if self.spec.lm_head == "own":
            logits: Tensor = self.layers[depth].lm_head(normed)  # type: ignore[operator]
            return logits if self.draft_vocabulary is None else logits[..., self.draft_vocabulary]
        output = self._output[0]
        return output(normed.to(output.weight.dtype))[..., : self.vocab_size]  # type: ignore[no-any-return]

    def token_ids(self, choices: Tensor) -> Tensor:
        """Places in the draft vocabulary -> token ids."""
        return choices if self.draft_vocabulary is None else self.draft_vocabulary[choices]

    def full_logits(self, logits: Tensor) -> Tensor:
        """logits (B, V_draft) -> (B, V), -inf for tokens that are never drafted."""
        if self.draft_vocabulary is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.vocab_size), float("-inf"))
        return full.index_copy_(-1, self.draft_vocabulary, logits)


def head_config(target: PreTrainedModel, spec: MTPSpec, num_layers: int) -> PreTrainedConfig:
    """A copy of the target's config, from which the decoder layer class builds layer 0..num_layers-1 of a head.

    MTP layers are of the kind of the target's last layer (or its last one of the row's `block_layer_type`): mixture-of-experts
    where that is, and of its attention type; then come the changes that the row makes.
    """
    config = copy.deepcopy(text_config(target))
    config.num_target_layers, config.block_origin = config.num_hidden_layers, _block_origin(config, spec, target)
    per_layer = {key: getattr(config, key)[config.block_origin] for key in PER_LAYER if getattr(config, key, None) is not None}
    overridden = config.per_layer_attributes or set()
    config.num_hidden_layers = num_layers
    for key, value in {**per_layer, **dict(spec.block_config)}.items():
        if (usual := getattr(config, key, None)) is not None:  # what a config does not have stays away
            setattr(config, key, [value] * num_layers if isinstance(usual, list) else value)
    if spec.sublayers is not None:
        config.layer_types = sublayer_kinds(config, spec, num_layers)
    for key, listed in spec.depth_types:
        setattr(config, key, list(getattr(config, listed, None) or getattr(config, key))[:num_layers])
    if overridden:  # transformers builds such layers from overrides by number
        types = enumerate(getattr(config, "layer_types", None) or num_layers * [""])
        config.per_layer_config = {depth: _overrides(target, kind, config.block_origin, overridden) for depth, kind in types}
    if getattr(config, "first_k_dense_replace", None) is not None:
        config.first_k_dense_replace = 0
    if spec.depth_windows is not None:
        _set_window(config, spec)
    return config


def _overrides(target: PreTrainedModel, layer_type: str, origin: int, names: set[str]) -> dict[str, Any]:
    """What the target's last layer of a type has otherwise than its config says for all; of one that it lacks, the origin's."""
    config = text_config(target)
    types = enumerate(getattr(config, "layer_types", None) or ())
    like = config.per_layer_config[max((i for i, name in types if name == layer_type), default=origin)]
    return {name: getattr(like, name) for name in names}


def _set_window(config: PreTrainedConfig, spec: MTPSpec) -> None:
    """The sliding window that a config gives the head. Raises UnsupportedModelError where depths have different ones."""
    windows = {window for window in getattr(config, str(spec.depth_windows), None) or () if window}
    if len(windows) > 1:
        raise UnsupportedModelError(
            f"The {spec.family} head was asked for; its config has {spec.depth_windows}={sorted(windows)}, and mtpdecode knows "
            "heads with one sliding window only. To speculate without a head, pass proposer=NGramProposer()."
        )
    for window in windows:
        config.sliding_window = window


def _check_drafts_ahead(block: nn.Module, spec: MTPSpec) -> None:
    """Raise UnsupportedModelError for a recurrent block: it would have to draft from a state that is not committed yet."""
    mixers = [type(module).__name__ for module in block.modules() if (kind := kind_of(module)) and kind.inputs]
    if mixers:
        raise UnsupportedModelError(
            f"A {spec.family} head was asked for, whose blocks are built like a recurrent layer of the target ({mixers[0]}); "
            "heads have attention. Pass spec=spec.replace(block_layer_type='full_attention')."
        )


def _new_block(target: PreTrainedModel, spec: MTPSpec, config: PreTrainedConfig, index: int) -> nn.Module:
    origin, norm = decoder_of(target).layers[config.block_origin], final_norm_of(target)
    if spec.sublayers is not None:
        return SubLayers(type(origin), config, fresh_norm(norm))
    if spec.block == "half_layer":
        return HalfLayer(origin, config, index, (fresh_norm(norm), fresh_norm(norm)))
    block: nn.Module = type(origin)(config, index)
    _check_drafts_ahead(block, spec)
    if spec.block == "plain_layer":
        block = PlainLayer(block)
    for path, value in spec.block_attributes:
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, value)
    return block


def _block_origin(config: PreTrainedConfig, spec: MTPSpec, target: PreTrainedModel) -> int:
    """The layer of the target that the head's blocks are built like. Raises UnsupportedModelError where there is none."""
    if spec.block_layer_type is None:
        return len(decoder_of(target).layers) - 1
    types = [TYPE_NAMES.get(name, name) for name in config.layer_types]
    if spec.block_layer_type not in types:
        raise UnsupportedModelError(
            f"The {spec.family} head of {type(target).__name__} was asked for; its blocks are built like a "
            f"{spec.block_layer_type} layer, and the target has only {', '.join(sorted(set(config.layer_types)))}. "
            "Load the checkpoint with its own config, or pass spec=spec.replace(block_layer_type=...)."
        )
    return max(i for i, name in enumerate(types) if name == spec.block_layer_type)


def _linear(weight: Tensor) -> nn.Linear:
    """weight (out, in), as the Linear that has it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def fresh_norm(norm: nn.Module) -> nn.Module:
    """A norm like the target's, of its class and with its settings, whose weight is as new."""
    new = copy.deepcopy(norm)
    with torch.no_grad():
        for parameter, start in zip(new.parameters(), type(norm)(len(new.weight)).parameters(), strict=True):  # type: ignore
            parameter.copy_(start)
    return new


def _restore_dtypes(module: nn.Module, origins: Iterable[nn.Module], usual: torch.dtype) -> None:
    """Parts that the target keeps in another dtype (the correction bias of experts, in float32) have that one in the head too."""
    tensors = [pair for origin in origins for pair in origin.state_dict().items()]
    others = {f".{name}": tensor.dtype for name, tensor in tensors if tensor.dtype != usual}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        dtype = next((dtype for end, dtype in others.items() if f".{name}".endswith(end)), tensor.dtype)
        tensor.data = tensor.data.to(dtype)
