"""Read and write a head's tensors under their real names, strictly. Knows files and names, no module."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.hub import cached_file

from .errors import CheckpointError, HeadWeightsError
from .spec import MTPSpec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DRAFT_VOCABULARY = "draft_vocabulary"
TEXT_CONFIGS = ("text_config", "llm_config")
"""Where the config of a model that reads more than text has that of the part which writes."""

QUANTISED = (
    *(".weight_scale_inv", ".weight_scale", ".weight_packed", ".scale"),  # compressed-tensors, FP8 and FP4, DeepSeek's own
    *(".qweight", ".qzeros", ".scales", ".weight.absmax", ".SCB"),  # GPTQ and AWQ, bitsandbytes
)
"""How the tensors beside a quantised matrix are called."""


class Part(NamedTuple):
    """One tensor of a checkpoint: its name there, the shape that it must have, and which of its rows are meant; None: all."""

    name: str
    shape: tuple[int, ...]
    rows: slice | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What is meant, of a checkpoint's tensors."""
        return tensors[self.name] if self.rows is None else tensors[self.name][self.rows]


class Checkpoint:
    """A folder or hub repository with safetensors weights, opened without reading a tensor.

    config  the raw config.json        files   tensor name -> the file that holds it

    Raises CheckpointError where a file is absent, truncated or not safetensors.
    """

    def __init__(self, path_or_repo: str | os.PathLike[str]) -> None:
        self.source = os.fspath(path_or_repo)
        self.config = _read_json(self._required("config.json"))
        index = self._find(INDEX)
        names = _shards(index) if index else [SINGLE]
        self.files: dict[str, Path] = {}
        for path in map(self._required, names):
            self.files |= dict.fromkeys(_tensor_names(path), path)

    def _find(self, name: str) -> Path | None:
        if not Path(self.source).is_dir():
            found = cached_file(self.source, name, _raise_exceptions_for_missing_entries=False)
            return Path(found) if found else None
        path = Path(self.source) / name
        return path if path.is_file() else None

    def _required(self, name: str) -> Path:
        try:
            found = self._find(name)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.source!r} was asked for; it is no local folder, and the hub says: {str(error).splitlines()[0]} "
                "Give a folder with config.json and safetensors weights, or a repository that this machine can reach."
            ) from error
        if found is None:
            raise CheckpointError(
                f"{name!r} of {self.source!r} was asked for; it is absent. "
                "Give a folder or repository with config.json and all of its safetensors files."
            )
        return found

    def optional(self, name: str) -> dict[str, Any]:
        """What a JSON file of the checkpoint says; nothing where there is none."""
        path = self._find(name)
        return _read_json(path) if path else {}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on CPU; each file is opened once."""
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.files[name]].append(name)
        tensors: dict[str, Tensor] = {}
        for path, wanted in by_file.items():
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in wanted}
        return tensors


def num_head_layers(checkpoint: Checkpoint, spec: MTPSpec) -> int:
    """How many MTP layers a checkpoint promises: what its config says, else as many as its tensors show; 0 where it has none."""
    config = checkpoint.config
    sources = (config, *(config.get(inner) or {} for inner in TEXT_CONFIGS))
    said = (_looked_up(source, key) for source in sources for key in spec.num_layers_keys)
    entry = "block" if "{i}" in spec.pattern("block") else spec.entry
    shown = len(spec.places(entry, checkpoint.files)) or int(not spec.num_layers_keys)  # counted nowhere: there is one at least
    number = next((int(number) for number in said if number is not None), shown)
    return max(shown, 1) if number and spec.counted_by == "tensors" else number


def _looked_up(config: Mapping[str, Any], path: str) -> Any:
    """A config field, or None; a path with dots leads into nested configs."""
    for key in path.split("."):
        config = (config or {}).get(key)  # type: ignore[assignment]
    return config


def read_draft_vocabulary(checkpoint: Checkpoint) -> Tensor | None:
    """(V_draft,) int64, the ids over which the head drafts, or None: all."""
    if DRAFT_VOCABULARY not in checkpoint.files:
        return None
    return checkpoint.read([DRAFT_VOCABULARY])[DRAFT_VOCABULARY].long()


def read_head(checkpoint: Checkpoint, spec: MTPSpec, num_target_layers: int, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's tensors under our names: `layers.0.proj.weight` and so on.

    expected  our name -> a tensor (on any device, meta too) of the right shape

    Raises HeadWeightsError that lists what is missing, surplus, misshapen or not finite, under the checkpoint's own names.
    """
    shapes = {ours: tuple(tensor.shape) for ours, tensor in expected.items()}
    plan = {ours: _parts(ours, shapes, spec, num_target_layers, checkpoint) for ours in expected}
    absent = {ours for ours in plan if ours.endswith(spec.optional) and plan[ours][0].name not in checkpoint.files}
    plan = {ours: parts for ours, parts in plan.items() if ours not in absent}
    _check_names(checkpoint, spec, num_target_layers, plan)
    theirs = checkpoint.read(part.name for parts in plan.values() for part in parts)
    _check_values(checkpoint, plan, theirs)
    found = {ours: _assemble([part.of(theirs) for part in parts], expected[ours]) for ours, parts in plan.items()}
    return {ours: found.get(ours, tensor) for ours, tensor in expected.items()}


def write_head(
    folder: Path, spec: MTPSpec, num_target_layers: int, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """The opposite of `read_head`: tensors under our names become a folder that it reads. Nothing is left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    named = ((ours, _their_name(ours, spec, num_target_layers), tensor.detach().cpu()) for ours, tensor in tensors.items())
    theirs = {name: part.clone() for ours, whole, tensor in named for name, part in _unstacked(ours, whole, tensor, spec)}
    partial = folder / (SINGLE + ".partial")
    save_file(_woven(theirs, spec), partial, metadata={"format": "pt"})
    os.replace(partial, folder / SINGLE)
    partial = folder / "config.json.partial"
    partial.write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
    os.replace(partial, folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} was to be read as JSON; {error}. Download or write it again.") from error


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{str(index)!r} was to say which file holds which tensor; it has no weight_map. Download it again."
        )
    return sorted(set(weight_map.values()))


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(path)!r} was to be read as safetensors; it is truncated or damaged ({error}). Download or write it again."
        ) from error


def _their_name(ours: str, spec: MTPSpec, num_target_layers: int) -> str:
    """`layers.0.norm_embed.weight` -> `model.layers.30.enorm.weight`, as the family writes it."""
    if ours == DRAFT_VOCABULARY:
        return ours
    _, layer, part, rest = ours.split(".", 3)
    if part == "block":
        for theirs, fragment in spec.renames:
            rest = _renamed(rest, fragment, theirs)
    return spec.tensor_pattern(part, rest).format(i=int(layer), n=num_target_layers + int(layer))


def _renamed(name: str, old: str, new: str) -> str:
    """With one run of whole name parts replaced: (a.b.c, b.c, x) -> a.x."""
    return re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)


def _matrices(name: str, experts: tuple[str, ...]) -> list[str]:
    """The matrices of each expert that a stacked tensor of transformers holds; none for another tensor.

    mlp.experts.gate_up_proj  ->  gate_proj, up_proj        mlp.experts.down_proj  ->  down_proj
    """
    parent, _, last = name.rpartition(".experts.")
    stacked = {"gate_up_proj": experts[:-1], "up_proj": experts[:-1], "down_proj": experts[-1:]}
    return list(stacked.get(last, ())) if parent else []


def _parts(
    ours: str, shapes: Mapping[str, tuple[int, ...]], spec: MTPSpec, num_target_layers: int, checkpoint: Checkpoint
) -> list[Part]:
    """The tensors of the checkpoint that make up one of ours: one, or one per expert where transformers stacks experts, or two
    where it joins gate and up.

    gate_up_proj  (E, 2I, H)  <-  E times gate_proj (I, H) and up_proj (I, H)        down_proj  (E, H, I)  <-  E times (H, I)
    """
    name, matrices, shape = _their_name(ours, spec, num_target_layers), _matrices(ours, spec.experts), shapes[ours]
    if name in checkpoint.files:
        return [Part(name, shape)]
    if woven := _interleaved(ours, shape, spec):
        return [woven._replace(name=_their_name(woven.name, spec, num_target_layers))]
    if fused := _fused(ours, shapes, spec):
        whole = _their_name(fused.name, spec, num_target_layers)
        return [fused._replace(name=whole)] if whole in checkpoint.files else [Part(name, shape)]
    if matrices:
        num_experts, rows, columns = shape
        stem, part = name.rpartition(".")[0], (rows // len(matrices), columns)
        return [Part(f"{stem}.{expert}.{matrix}.weight", part) for expert in range(num_experts) for matrix in matrices]
    joined = ".gate_up_proj.weight"
    if name.endswith(joined) and name.replace(joined, ".gate_proj.weight") in checkpoint.files:
        rows, columns = shape
        return [Part(name.replace(joined, f".{half}.weight"), (rows // 2, columns)) for half in ("gate_proj", "up_proj")]
    return [Part(name, shape)]


def _fused(ours: str, shapes: Mapping[str, tuple[int, ...]], spec: MTPSpec) -> Part | None:
    """Where one of ours lies in a matrix that some checkpoints of the family have for several, under our name of that.

    k_proj (4, H)  <-  rows 8..12 of qkv_proj (16, H), if q_proj has 8 rows
    """
    stem, matrix, kind = ours.rsplit(".", 2)
    for whole, parts in spec.fused:
        if matrix in parts:
            rows = [shapes[f"{stem}.{part}.{kind}"][0] for part in parts]
            start = sum(rows[: parts.index(matrix)])
            return Part(f"{stem}.{whole}.{kind}", (sum(rows), *shapes[ours][1:]), slice(start, start + shapes[ours][0]))
    return None


def _interleaved(ours: str, shape: tuple[int, ...], spec: MTPSpec) -> Part | None:
    """Where one of ours lies in a matrix whose rows belong to several by turns, under our name of that.

    up_proj (4, H)  <-  rows 1, 3, 5, 7 of w13_dn (8, H)
    """
    stem, matrix, kind = ours.rsplit(".", 2)
    for whole, parts in spec.interleaved:
        if matrix in parts:
            number = len(parts)
            return Part(f"{stem}.{whole}.{kind}", (number * shape[0], *shape[1:]), slice(parts.index(matrix), None, number))
    return None


def _woven(theirs: dict[str, Tensor], spec: MTPSpec) -> dict[str, Tensor]:
    """The opposite of `_interleaved`, over all tensors of a head under their names."""
    for whole, parts in spec.interleaved:
        for name in [each for each in theirs if f".{parts[0]}." in each]:
            pieces = [theirs.pop(name.replace(f".{parts[0]}.", f".{part}.")) for part in parts]
            theirs[name.replace(f".{parts[0]}.", f".{whole}.")] = torch.stack(pieces, dim=1).flatten(0, 1)
    return theirs


def _unstacked(ours: str, theirs: str, tensor: Tensor, spec: MTPSpec) -> Iterator[tuple[str, Tensor]]:
    """The opposite of `_parts`: a matrix per expert."""
    matrices = _matrices(ours, spec.experts)
    if not matrices:
        yield theirs, tensor
        return
    stem = theirs.rpartition(".")[0]
    for expert, both in enumerate(tensor):
        for matrix, part in zip(matrices, both.chunk(len(matrices)), strict=True):
            yield f"{stem}.{expert}.{matrix}.weight", part


def _assemble(parts: list[Tensor], like: Tensor) -> Tensor:
    if len(parts) == 1 and parts[0].shape == like.shape:
        return parts[0]
    return torch.cat(parts).view(like.shape)


def _check_names(checkpoint: Checkpoint, spec: MTPSpec, num_target_layers: int, plan: Mapping[str, list[Part]]) -> None:
    needed = {part.name for parts in plan.values() for part in parts}
    num_layers = len({ours.split(".")[1] for ours in plan})
    *prefixes, next_prefix = (spec.prefix.format(i=i, n=num_target_layers + i) for i in range(num_layers + 1))
    present = {name for name in checkpoint.files if name.startswith((*prefixes, next_prefix))}  # a layer too many is surplus
    _refuse_quantised(checkpoint, present)
    present -= {prefix + name for prefix in (*prefixes, next_prefix) for name in spec.ignored}
    if not present:
        raise HeadWeightsError(
            f"The {spec.family} head of {checkpoint.source!r} was asked for; the files hold none of its tensors "
            f"({', '.join(sorted(p + '*' for p in prefixes))}): fine-tuning, merging or quantising often drops them. "
            "Take the head from the original checkpoint: MTPDecoder.from_model(model, head='ORIGINAL/REPOSITORY')."
        )
    present |= needed & checkpoint.files.keys()  # a part may lie elsewhere, among what is the target's
    problems = _listed("missing", needed - present) + _listed("surplus", present - needed)
    if problems:
        raise HeadWeightsError(_disagreement(checkpoint, problems))


def _check_values(checkpoint: Checkpoint, plan: Mapping[str, list[Part]], theirs: Mapping[str, Tensor]) -> None:
    problems = _misfits({part.name: part.shape for parts in plan.values() for part in parts}, theirs)
    if problems:
        raise HeadWeightsError(_disagreement(checkpoint, problems))


def _misfits(shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with tensors that should have these shapes."""
    wrong = {name for name, shape in shapes.items() if tuple(found[name].shape) != shape}
    misshapen = {f"{name} is {tuple(found[name].shape)}, not {shapes[name]}" for name in wrong}
    broken = {name for name in shapes if not bool(torch.isfinite(found[name].float()).all())}
    return _listed("misshapen", misshapen) + _listed("with NaN or infinite values", broken)


def fitted(
    source: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], copies: Collection[str]
) -> dict[str, Tensor]:
    """The tensors of an assistant's checkpoint, which has our names; `copies` in it repeat others and are left out.

    Raises HeadWeightsError that lists what is missing, surplus, misshapen, not finite or quantised.
    """
    tensors = {name: tensor for name, tensor in found.items() if name not in copies}
    both = {name: tuple(expected[name].shape) for name in expected if name in tensors}
    quantised = {name for name in tensors if name.endswith(QUANTISED)}
    problems = _listed("missing", set(expected) - set(tensors)) + _listed("quantised", quantised)
    problems += _listed("surplus", set(tensors) - set(expected) - quantised) + _misfits(both, tensors)
    if problems:
        raise HeadWeightsError(
            f"{source} was given as assistant; its tensors are not those that its config describes. {'; '.join(problems)}. "
            "Download it again, in bfloat16 and not quantised."
        )
    return tensors


def _refuse_quantised(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    scales = sorted(name for name in names if name.endswith(QUANTISED))
    if scales:
        raise HeadWeightsError(
            f"The MTP head of {checkpoint.source!r} was asked for; it is quantised ({scales[0]} and {len(scales) - 1} more), "
            "which mtpdecode does not unpack. Give a head in bfloat16: from_model(model, head='ORIGINAL/REPOSITORY')."
        )


def _listed(what: str, names: set[str], most: int = 6) -> list[str]:
    if not names:
        return []
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{what}: {', '.join(sorted(names)[:most])}{rest}"]


def _disagreement(checkpoint: Checkpoint, problems: list[str]) -> str:
    return (
        f"The MTP head of {checkpoint.source!r} does not fit the family and the config. {'; '.join(problems)}. "
        "Download the checkpoint again, or pass the spec=MTPSpec(...) that describes it."
    )
