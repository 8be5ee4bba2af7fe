"""From checkpoints to modules and back: the head that goes with a target."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import __version__ as version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .checkpoint import (
    DRAFT_VOCABULARY,
    INDEX,
    SINGLE,
    Checkpoint,
    num_head_layers,
    read_draft_vocabulary,
    read_head,
    write_head,
)
from .errors import HeadWeightsError, UnsupportedModelError
from .families import FAMILIES, known_model_types, spec_for
from .head import MTPHead
from .spec import MTPSpec
from .target import decoder_of, text_config
from .vocabulary import is_list_of_ids

OTHER_DRAFTERS = ("EAGLE", "DFlash", "DSpark", "Medusa")
"""Drafters that engines know besides native heads, by a word that stands in their configs."""
TARGET_FILE, HEAD_FILE = "model-target.safetensors", "model-mtp.safetensors"


def load_target(path_or_repo: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """The target alone. A base that transformers lacks but that equals one it has (MiMo-7B is Qwen2) is loaded as that one."""
    source = os.fspath(path_or_repo)
    raw = Checkpoint(source).config
    _refuse_stranger(source, raw)
    if not kwargs.get("trust_remote_code") and (config := _as_another(raw)):
        kwargs["config"] = config
    known = kwargs["config"].model_type if "config" in kwargs else raw.get("model_type")
    if known not in CONFIG_MAPPING and not kwargs.get("trust_remote_code"):
        raise UnsupportedModelError(_unknown_base(source, raw))
    return _auto_class(known).from_pretrained(source, **kwargs)  # type: ignore[no-any-return]


def _as_another(raw: dict[str, Any]) -> PreTrainedConfig | None:
    """The config of the model that a checkpoint's base equals, where transformers has no class for its own."""
    model_type = raw.get("model_type")
    row = next((row for row in FAMILIES if model_type in row.model_types and row.base_model_type), None)
    if row is None or model_type == row.base_model_type:
        return None
    settings = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map", "architectures")}
    if row.text_alone:
        settings = {"text_config": settings, "vision_config": dict(row.text_alone)}
    elif model_type in CONFIG_MAPPING:
        return None
    return AutoConfig.for_model(str(row.base_model_type), **settings)


def _auto_class(model_type: str | None) -> Any:
    """What loads a model: as a text model where transformers can, else with all that it reads besides."""
    if model_type is None or model_type not in CONFIG_MAPPING:
        return AutoModelForCausalLM
    known = CONFIG_MAPPING[model_type]
    is_wrapped = known in MODEL_FOR_MULTIMODAL_LM_MAPPING and known not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForMultimodalLM if is_wrapped else AutoModelForCausalLM


def _unknown_base(source: str, raw: dict[str, Any]) -> str:
    """What to say of a model that transformers does not know."""
    model_type = raw.get("model_type")
    told = f"{source!r} was asked for; its config says model_type={model_type!r}, and transformers {version} has no such model. "
    head = "mtpdecode knows its MTP head; " if model_type in known_model_types() else ""
    if "auto_map" in raw:
        return f"{told}{head}pass trust_remote_code=True to run the target with the code that comes with the checkpoint."
    return (
        f"{told}{head}no code comes with the checkpoint either. Install a transformers that has {model_type!r}, or load the "
        "target yourself and pass it to MTPDecoder.from_model(model, head='FOLDER/OR/REPOSITORY')."
    )


def head_for(target: PreTrainedModel, source: MTPHead | str | os.PathLike[str] | None, spec: MTPSpec | None) -> MTPHead:
    """The head of a target: one in memory, or read from `source`, or from the checkpoint that the target came from.

    Raises UnsupportedModelError where the model has no head, HeadWeightsError where its tensors are not those of the family.
    """
    decoder_of(target)
    if isinstance(source, MTPHead):
        return _checked(source, target)
    model_type, name = _listed_type(target), type(target).__name__
    row = spec or spec_for(model_type, name)  # an unknown model is named before its files are looked for
    if row.kv == "target":
        raise UnsupportedModelError(
            f"The head of {name} was asked for; it drafts with an assistant, which is a checkpoint of its own. Pass the one that "
            f"is published with this model, as in assistant={row.examples[0]!r} (there are {', '.join(row.examples)}); "
            "to speculate without one, pass proposer=NGramProposer()."
        )
    place = os.fspath(source) if source is not None else target.name_or_path
    if not place:
        raise UnsupportedModelError(
            f"The head of {name} was asked for; the model was built in memory and names no checkpoint to read it from. "
            "Pass head='FOLDER/OR/REPOSITORY', or head=MTPHead(model, spec) for one with random weights; "
            "to speculate without a head, proposer=NGramProposer()."
        )
    checkpoint = Checkpoint(place)
    _refuse_drafter(checkpoint)
    _refuse_stranger(checkpoint.source, checkpoint.config)
    own = str(checkpoint.config.get("model_type"))  # tells more than a target that was loaded as another
    is_another = any(own in row.model_types and row.base_model_type == model_type for row in FAMILIES)
    return _read(target, checkpoint, spec or spec_for(own if is_another else model_type, name, checkpoint.files))


def _listed_type(target: PreTrainedModel) -> str:
    """The model type under which the table has a target: its own, or that of the part which writes text."""
    own, inner = str(target.config.model_type), str(text_config(target).model_type)
    return own if own in known_model_types() else inner


def _refuse_stranger(source: str, raw: dict[str, Any]) -> None:
    """Raises UnsupportedModelError for another model that goes by the model type of one in the table: transformers would load it
    as that one, with random weights where its tensors are called otherwise."""
    rows = [row for row in FAMILIES if raw.get("model_type") in row.model_types]
    found = {name for row in rows for name in row.strangers} & set(raw.get("architectures") or ())
    if found:
        raise UnsupportedModelError(
            f"{source!r} was asked for; it is a {', '.join(sorted(found))}, which transformers {version} has no class for though "
            f"it knows model_type={raw['model_type']!r}. mtpdecode decodes {', '.join(rows[0].examples)} and its like."
        )


def _refuse_drafter(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModelError where a checkpoint holds a drafter of another kind than a native MTP head."""
    config = checkpoint.config
    told = [config.get("model_type"), config.get("speculators_model_type"), *(config.get("architectures") or ())]
    told += [key for key in config if key.startswith("dspark_")]  # DeepSeek-V4.1 has DSpark stages where V4 has MTP layers
    found = next((name for name in OTHER_DRAFTERS if any(name.lower() in str(each).lower() for each in told)), None)
    if found:
        raise UnsupportedModelError(
            f"The MTP head of {checkpoint.source!r} was asked for; it holds a {found} drafter, which is trained apart and drafts "
            "in another way: mtpdecode decodes with native MTP heads only. Give the checkpoint that has one: "
            "from_model(model, head='ORIGINAL/REPOSITORY'); to speculate without a head, pass proposer=NGramProposer()."
        )


def _read(target: PreTrainedModel, checkpoint: Checkpoint, spec: MTPSpec) -> MTPHead:
    spec = spec.located(checkpoint.files)
    num_layers = num_head_layers(checkpoint, spec)
    if num_layers < 1:
        raise UnsupportedModelError(
            f"The MTP head of {checkpoint.source!r} was asked for; no {' or '.join(spec.num_layers_keys)} in its config counts "
            f"layers, so {type(target).__name__} has no native MTP head. "
            f"Known families: {', '.join(sorted(known_model_types()))}. "
            "Pass head='FOLDER/OR/REPOSITORY' to take one from elsewhere; to speculate without a head, proposer=NGramProposer()."
        )
    vocabulary = read_draft_vocabulary(checkpoint)
    if vocabulary is not None:
        _check_vocabulary(vocabulary, int(text_config(target).vocab_size), checkpoint.source)
    head = MTPHead(target, spec, num_layers, vocabulary)
    head.load_state_dict(read_head(checkpoint, head.spec, head.num_target_layers, head.state_dict()))
    head.num_speculative_tokens = int(checkpoint.config.get("num_speculative_tokens", num_layers))
    return head.eval()


def _check_vocabulary(ids: Tensor, vocab_size: int, source: str) -> None:
    if not is_list_of_ids(ids, vocab_size):
        raise HeadWeightsError(
            f"The MTP head of {source!r} was asked for; its {DRAFT_VOCABULARY} is not a list of different token ids in "
            f"0..{vocab_size - 1}. Take the head that was made for this model."
        )


def _checked(head: MTPHead, target: PreTrainedModel) -> MTPHead:
    """The head, if it goes with the target."""
    for name, what in (("hidden_size", "hidden states of size"), ("vocab_size", "a vocabulary of")):
        ours, theirs = getattr(head.config, name), getattr(text_config(target), name)
        if ours != theirs:
            raise HeadWeightsError(
                f"A head for {what} {ours} was given; {type(target).__name__} has {theirs}. Build it with MTPHead(model, spec)."
            )
    return head


def head_tensors(head: MTPHead) -> dict[str, Any]:
    """Every tensor that a head's checkpoint holds, under our names."""
    tensors = dict(head.state_dict())
    return tensors if head.draft_vocabulary is None else tensors | {DRAFT_VOCABULARY: head.draft_vocabulary.int()}


def save_head(head: MTPHead, folder: str | os.PathLike[str]) -> None:
    """Write a head alone, in its family's layout, as a folder for `head=`."""
    config = {
        "model_type": head.config.model_type,
        "num_hidden_layers": head.num_target_layers,
        "hidden_size": head.config.hidden_size,
        "num_speculative_tokens": head.num_speculative_tokens,
    }
    _count(config, head)
    write_head(Path(folder), head.spec, head.num_target_layers, head_tensors(head), config)


def _count(config: dict[str, Any], head: MTPHead) -> None:
    """Let a config say how many layers a head has, in every field where its family looks."""
    for key in head.spec.num_layers_keys:
        *path, last = key.split(".")
        inner = config
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = head.num_layers


def save_together(target: PreTrainedModel, head: MTPHead, folder: str | os.PathLike[str]) -> None:
    """Write target and head as one checkpoint that `from_pretrained` reads back; nothing is left half-written."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch) / "checkpoint"
        as_it_was = dict(vars(target.config))
        try:
            target.save_pretrained(whole)
        finally:
            vars(target.config).update(as_it_was)  # transformers writes the dtype as a string into the config of what it saves
        save_head(head, Path(scratch) / "head")
        if (whole / SINGLE).exists():  # transformers would read a file of this name alone, and no index
            os.replace(whole / SINGLE, whole / TARGET_FILE)
        os.replace(Path(scratch) / "head" / SINGLE, whole / HEAD_FILE)
        _index(whole)
        config = json.loads((whole / "config.json").read_text())
        _count(config, head)
        config["num_speculative_tokens"] = head.num_speculative_tokens
        (whole / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _swap(whole, folder)


def _index(folder: Path) -> None:
    """An index over all safetensors files of a folder, as sharded checkpoints have."""
    names: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names |= dict.fromkeys(file.keys(), path.name)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=2) + "\n")


def _swap(new: Path, folder: Path) -> None:
    """Put a finished folder where an old one may lie; files that the old one has besides (a tokenizer) stay."""
    if not folder.exists():
        os.replace(new, folder)
        return
    for stale in folder.glob("model*.safetensors*"):
        if not (new / stale.name).exists():
            stale.unlink()
    for path in new.iterdir():
        os.replace(path, folder / path.name)
