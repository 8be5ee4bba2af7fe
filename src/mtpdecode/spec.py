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
    """(name in the checkpoint, ours) of what surrounds the block: norm_embed, norm_hidden, proj, norm_out, lm_head, embedding.

    An entry for "block" says where the block lies under the prefix; without one, everything else under the prefix is the block's.
    What has neither `{i}` nor `{n}` in prefix and name is one tensor that all depths share.
    """
    other_prefixes: tuple[str, ...] = ()
    """Where it lies when the model is wrapped in another; the first prefix that a checkpoint uses is taken."""
    renames: tuple[tuple[str, str], ...] = ()
    """Inside the block: (part of a name in the checkpoint, the same in transformers' module)."""
    experts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    """The matrices of one expert in a checkpoint; two where experts have no gate. Stacked experts are read as well."""
    num_layers_keys: tuple[str, ...] = ("num_nextn_predict_layers", "num_mtp_layers")
    """Config fields that count the head's layers; the first one present wins, and where there is none the tensors are counted."""
    ignored: tuple[str, ...] = ()
    """Names under the prefix that repeat the target's embedding or output layer."""
    block_layer_type: str | None = None
    """The block is built as the target's last layer of this type; None: as its last layer."""
    block_config: tuple[tuple[str, Any], ...] = ()
    """(config field, value): what the block's config has otherwise; a field that is a list gets the value for every depth."""
    combine: Literal["embed_hidden", "hidden_embed"] = "embed_hidden"
    """Order inside the projection."""
    proj_bias: bool = False
    """Whether the projection has a bias."""
    hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    """Which hidden state of the target is fed: the final norm's output or its input."""
    recycle: Literal["normed", "raw"] = "normed"
    """Which of the head's own outputs feeds the next draft step: after or before `norm_out`."""
    norm_out: Literal["own", "target", "none"] = "own"
    """The norm before the output layer: one of the head's, the target's final one, or none."""
    lm_head: Literal["target", "own"] = "target"
    """Whose output layer; "own": one a depth, named in `names`."""
    embedding: Literal["target", "own"] = "target"
    """Whose embedding table; "own": named in `names`."""
    zero_first_embedding: bool = False
    """Whether row 0 sees zeros instead of its token's embedding, as vLLM does for several families."""
    base_model_type: str | None = None
    """The transformers model type that the target is, where transformers does not know `model_types` itself."""
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
        return ("norm_embed", "norm_hidden", "proj", *(name for name, whose in optional.items() if whose == "own"))

    def pattern(self, part: str) -> str:
        """Where a part lies in a checkpoint: "norm_embed" -> "model.layers.{n}.enorm.", "block" -> "model.layers.{n}."."""
        theirs = {ours: name + "." for name, ours in self.names}
        return self.prefix + (theirs.get(part, "") if part == "block" else theirs[part])

    def is_shared(self, part: str) -> bool:
        """Whether all depths have one and the same."""
        return not re.search("{[in]}", self.pattern(part))

    def places(self, part: str, names: Iterable[str]) -> set[str]:
        """Where a part lies in a checkpoint with tensors of these names, once per layer: {"model.layers.61.eh_proj."}."""
        pattern = re.compile(re.sub(r"\\{[in]\\}", r"\\d+", re.escape(self.pattern(part))))
        return {match.group() for match in map(pattern.match, names) if match}

    def located(self, names: Collection[str]) -> MTPSpec:
        """The row with the prefix that a checkpoint uses; where it uses none of them, as it is."""
        rows = [self.replace(prefix=prefix) for prefix in (self.prefix, *self.other_prefixes)]
        return next((row for row in rows if row.places("proj", names)), self)

    def replace(self, **changes: Any) -> MTPSpec:
        """This row with some choices changed, as in `spec.replace(hidden="post_norm")`."""
        return replace(self, **changes)
