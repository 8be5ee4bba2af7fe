"""A family of MTP heads, as data. This file knows no model and no tensor."""

from __future__ import annotations

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
    """(name in the checkpoint, our name) of what surrounds the block; every other tensor under the prefix is the block's."""
    num_layers_keys: tuple[str, ...] = ("num_nextn_predict_layers", "num_mtp_layers")
    """Config fields that count the head's layers; the first one present wins."""
    ignored: tuple[str, ...] = ()
    """Names under the prefix that repeat the target's embedding or output layer."""
    combine: Literal["embed_hidden", "hidden_embed"] = "embed_hidden"
    """Order inside the projection."""
    hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    """Which hidden state of the target is fed: the final norm's output or its input."""
    recycle: Literal["normed", "raw"] = "normed"
    """Which of the head's own outputs feeds the next draft step: after or before `norm_out`."""
    base_model_type: str | None = None
    """The transformers model type that the target is, where transformers does not know `model_types` itself."""
    examples: tuple[str, ...] = ()
    """Public checkpoints."""
    verified: str = ""
    """What the tests hold the row to."""
    source: str = ""
    """Where the choices come from."""

    def replace(self, **changes: Any) -> MTPSpec:
        """This row with some choices changed, as in `spec.replace(hidden="post_norm")`."""
        return replace(self, **changes)
