"""A family of MTP heads, as data. This file knows no model and no tensor."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class MTPSpec:
    """One family of native multi-token-prediction heads.

    A head maps (hidden state at position i, embedding of token i+1) to a hidden state that predicts token i+2:

        x = proj(concat(norm_embed(e), norm_hidden(h)))        z = norm_out(block(x))        logits = lm_head(z)

    What differs between families is a field here and nowhere else.
    """

    family: str
    """Our name of the family, unique in the table."""
    model_types: tuple[str, ...]
    """The values of `config.model_type` that the family goes with."""
    prefix: str
    """Where layer i of the head lies in a checkpoint; `{i}` is its number and `{n}` that of the target's layers plus i."""
    names: tuple[tuple[str, str], ...]
    """(name in the checkpoint, ours) of what surrounds the block: norm_embed, norm_hidden, proj, norm_out, lm_head, embedding;
    proj_embed and proj_hidden where their results are added; mixer, or its tensors one by one ("mixer.hc_fn").

    An entry for "block" says where the block lies under the prefix; without one, everything else under the prefix is the block's.
    A name with "../" in front lies that much higher than the prefix.
    What has neither `{i}` nor `{n}` in prefix and name is one tensor that all depths share.
    """
    other_prefixes: tuple[str, ...] = ()
    """Where it lies when the model is wrapped in another; the first prefix that a checkpoint uses is taken."""
    renames: tuple[tuple[str, str], ...] = ()
    """Inside the block: (part of a name in the checkpoint, the same in transformers' module)."""
    experts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    """The matrices of one expert in a checkpoint; two where experts have no gate. Stacked experts are read as well."""
    counted_by: Literal["config", "tensors"] = "config"
    """What says how many layers the head has; "tensors": a config that has the field promises a head, whatever it counts."""
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Inside the block: (one matrix of some checkpoints, those of the block whose rows it holds, one behind the other)."""
    interleaved: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Inside the block: (one matrix of the checkpoint, those of the block whose rows take turns in it)."""
    optional: tuple[str, ...] = ()
    """Tensors of the block that a checkpoint may leave out; they are then as in a new layer."""
    num_layers_keys: tuple[str, ...] = ("num_nextn_predict_layers", "num_mtp_layers")
    """Config fields that count the head's layers; the first one present wins, and where there is none the tensors are counted."""
    ignored: tuple[str, ...] = ()
    """Names under the prefix that repeat the target's embedding or output layer."""
    block_layer_type: str | None = None
    """The block is built as the target's last layer of this type; None: as its last layer."""
    block: Literal["layer", "half_layer", "plain_layer"] = "layer"
    """What the block is: a layer of the target's class; where that has two attentions and two MLPs, a layer of one each; where it
    has hyper-connections, the same layer without them."""
    sublayers: str | None = None
    """Config field that lists the layers, by type, of which the block is a row; None: the block is one layer."""
    depth_types: tuple[tuple[str, str], ...] = ()
    """(config field with an entry a layer, the field that lists the same for the head's depths): where a config has the latter,
    it goes before what the block is built as."""
    depth_windows: str | None = None
    """Config field that lists the sliding window of every depth, 0 where it has none; None: those that slide have the base's."""
    block_attributes: tuple[tuple[str, Any], ...] = ()
    """(attribute inside the block, value): what no config field says."""
    block_config: tuple[tuple[str, Any], ...] = ()
    """(config field, value): what the block's config has otherwise; a field that is a list gets the value for every depth, and
    one that the config does not have stays away."""
    combine: Literal["embed_hidden", "hidden_embed", "sum"] = "embed_hidden"
    """Order inside the projection; "sum": each has a projection of its own, proj_embed and proj_hidden, and they are added."""
    proj_bias: bool | str = False
    """Whether the projection has a bias; a name: as that config field says."""
    hidden: Literal["post_norm", "pre_norm", "streams"] = "post_norm"
    """Which hidden state of the target is fed: the final norm's output or its input, or all residual streams before the mixer."""
    streams: str | None = None
    """Config field that counts the residual streams of the head; it has a mixer like the target's, and recycles them ("raw")."""
    stream_norm: Literal["each", "joint", "grouped"] = "each"
    """norm_hidden over streams: one weight for each of them, or a weight for all in a row, normed together or one by one."""
    stream_axis: bool = False
    """Whether the layer class wants (B, T, streams, D), with an axis for streams, instead of (B, T, streams * D)."""
    angles: Literal["window", "three_axes", "all_types", "all_slots"] = "window"
    """Rotary angles that the layer class wants: the window's; of positions told thrice, as time, height and width; a dict of them
    by type; those of all slots, then the window's."""
    recycle: Literal["normed", "raw", "projected"] = "normed"
    """Which of the head's own outputs feeds the next draft step: after or before `norm_out`, or a projection of its own."""
    kv: Literal["own", "target"] = "own"
    """Whose keys and values the head reads; "target": it has none, and is a checkpoint of its own, given as `assistant=`."""
    positions: Literal["advance", "frozen"] = "advance"
    """Where draft steps stand: each one further, or all at the last position that the target has written."""
    assistants: tuple[str, ...] = ()
    """The values of `config.model_type` in checkpoints that hold such a head."""
    deeper: Literal["chained", "target"] = "chained"
    """What the depths behind the first are fed: what the depth before put out, or the target's hidden states like the first."""
    used_layers: int | None = None
    """How many of the head's layers draft, from the first on; None: all of them."""
    beyond: Literal["last", "cycle"] = "last"
    """What drafts past the last depth: the last one again, row by row; or the chain anew from the first, step k being k mod D."""
    index_choice: Literal["each_step", "first_step", "config"] = "each_step"
    """When the indexer of a sparse block chooses keys: at each draft step; or at the first, and the later ones keep to its choice
    (what a query may see then ends at the text); or as `index_share_for_mtp_iteration` in the config says."""
    norm_out: Literal["own", "target", "none"] = "own"
    """The norm before the output layer: one of the head's, the target's final one, or none."""
    norm_out_if: str | None = None
    """Config field that says whether there is a `norm_out`; None: there is."""
    lm_head: Literal["target", "own"] = "target"
    """Whose output layer; "own": one a depth, named in `names`."""
    logits_divisor: str | None = None
    """Config field by which the state is divided before the output layer; what is recycled stays whole."""
    vocab_key: str | None = None
    """Config field that counts the tokens which the output layer knows, where it is padded to more."""
    embedding: Literal["target", "own"] = "target"
    """Whose embedding table; "own": named in `names`."""
    zero_first_embedding: bool = False
    """Whether row 0 sees zeros instead of its token's embedding, as vLLM does for several families."""
    base_model_type: str | None = None
    """The transformers model type that the target is, where transformers does not know `model_types` itself."""
    strangers: tuple[str, ...] = ()
    """Values of `config.architectures` that go by a model type of the row and are other models, to be refused."""
    text_alone: tuple[tuple[str, Any], ...] = ()
    """The vision_config, of no layers, with which a vision model as base holds a text model that has no class of its own."""
    examples: tuple[str, ...] = ()
    """Public checkpoints."""
    verified: str = ""
    """What the tests hold the row to."""
    source: str = ""
    """Where the choices come from."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Our names of what surrounds the block, in the order in which they are used."""
        optional = {"norm_out": self.norm_out, "lm_head": self.lm_head, "embedding": self.embedding}
        projections = ("proj_embed", "proj_hidden") if self.combine == "sum" else ("proj",)
        mixer = ("mixer",) if self.streams else ()
        own = (name for name, whose in optional.items() if whose == "own")
        return ("norm_embed", "norm_hidden", *projections, *mixer, *own)

    @property
    def entry(self) -> str:
        """The part by which a head is recognised in a checkpoint: its projection."""
        return self.parts[2]

    def pattern(self, part: str) -> str:
        """Where a part lies in a checkpoint: "norm_embed" -> "model.layers.{n}.enorm.", "block" -> "model.layers.{n}."."""
        theirs = {ours: name + "." for name, ours in self.names}
        scattered = any(ours.startswith(part + ".") for ours in theirs)
        return self._at(theirs.get(part, "") if part == "block" or scattered else theirs[part])

    def _at(self, name: str) -> str:
        """A name under the prefix; one that begins with "../" lies a part higher: model.layers.{n}. and ../../a -> model.a"""
        prefix = self.prefix
        while name.startswith("../"):
            prefix, name = prefix.rstrip(".").rpartition(".")[0] + ".", name.removeprefix("../")
        return prefix + name

    def tensor_pattern(self, part: str, rest: str) -> str:
        """Where one tensor lies: ("norm_embed", "weight") -> "model.layers.{n}.enorm.weight"."""
        alone = {ours: name for name, ours in self.names}.get(f"{part}.{rest}")
        return self.pattern(part) + rest if alone is None else self.prefix + alone

    def is_shared(self, part: str) -> bool:
        """Whether all depths have one and the same."""
        return not re.search("{[in]}", self.pattern(part))

    def places(self, part: str, names: Iterable[str]) -> set[str]:
        """Where a part lies in a checkpoint with tensors of these names, once per layer: {"model.layers.61.eh_proj."}."""
        pattern = re.compile(re.sub(r"\\{[in]\\}", r"\\d+", re.escape(self.pattern(part))))
        return {match.group() for match in map(pattern.match, names) if match}

    def fitted(self, config: object) -> MTPSpec:
        """The row for a target's config, which may say that there is no `norm_out`."""
        has_norm = self.norm_out_if is None or getattr(config, self.norm_out_if)
        return self if has_norm else self.replace(norm_out="none")

    def located(self, names: Collection[str]) -> MTPSpec:
        """The row with the prefix that a checkpoint uses; where it uses none of them, as it is."""
        rows = [self.replace(prefix=prefix) for prefix in (self.prefix, *self.other_prefixes)]
        return next((row for row in rows if row.places(self.entry, names)), self)

    def replace(self, **changes: Any) -> MTPSpec:
        """This row with some choices changed, as in `spec.replace(hidden="post_norm")`."""
        return replace(self, **changes)
