"""What all benchmarks share: the model, the card of the machine, the counter of tokens and forwards, tables and JSON files."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import mtpdecode
from benchmarks.prompts import PROMPTS, encode, selection

RESULTS = Path(__file__).parent / "results"
MODEL = "smollm2-135m-instruct"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


class Prompt(NamedTuple):
    """A held-out prompt. ids: its tokens, the chat template included."""

    kind: str
    text: str
    ids: list[int]


class Run(NamedTuple):
    """One decoding of one prompt. num_forwards: the target's, the prompt's included."""

    tokens: list[int]
    seconds: float
    num_forwards: int


class Batch(NamedTuple):
    """One decoding of several prompts together. tokens: the new ones of every row. num_forwards: as in a `Run`."""

    tokens: list[list[int]]
    seconds: float
    num_forwards: int


# ── settings ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def parser(description: str | None, num_per_kind: int) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--num-per-kind", type=int, default=num_per_kind, help="prompts of each kind (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file (default: benchmarks/results)")
    parser.add_argument(
        "--checkpoint", type=Path, help="a folder with target and head, decoded from random tokens, not the preset"
    )
    return parser


def start(args: argparse.Namespace) -> None:
    """What every benchmark does first: the threads, and silence from transformers between the lines of the report."""
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def loaded(args: argparse.Namespace, dtype: str | torch.dtype) -> tuple[mtpdecode.MTPDecoder, list[Prompt]]:
    """What is measured, and on what: the preset on the held-out prompts, or what --checkpoint names on random tokens."""
    if args.checkpoint:
        decoder = mtpdecode.MTPDecoder.from_pretrained(args.checkpoint, dtype=dtype)
        kinds = [kind for _ in range(args.num_per_kind) for kind in PROMPTS]
        return decoder, [random_prompt(decoder.target, kind, 8, seed) for seed, kind in enumerate(kinds)]
    decoder, tokenizer = mtpdecode.load(MODEL, dtype=dtype)
    return decoder, prompts(tokenizer, args.num_per_kind)


def random_prompt(model: PreTrainedModel, kind: str, num_tokens: int, seed: int = 0) -> Prompt:
    """Tokens that mean nothing, the same every time."""
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(size, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    return Prompt(kind, f"{num_tokens} random tokens", ids.tolist())


def prompts(tokenizer: PreTrainedTokenizerBase, num_per_kind: int) -> list[Prompt]:
    """The first `num_per_kind` prompts of each kind, the kinds in turn."""
    return [Prompt(kind, text, encode(tokenizer, kind, text)) for kind, text in selection(num_per_kind)]


def of_kind(rows: Sequence[Any], kind: str) -> list[Any]:
    return [row for row in rows if row.kind == kind]


# ── decoding ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def batches(chosen: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    for start in range(0, len(chosen), size):
        yield chosen[start : start + size]


def left_padded(rows: Sequence[Prompt], pad_id: int) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, P)."""
    length = max(len(row.ids) for row in rows)
    ids = [[pad_id] * (length - len(row.ids)) + row.ids for row in rows]
    mask = [[0] * (length - len(row.ids)) + [1] * len(row.ids) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def new_tokens(row: Tensor, prompt_length: int, eos_ids: Sequence[int]) -> list[int]:
    """The tokens behind the prompt, up to and with the first end token: what follows that is padding."""
    tokens = row[prompt_length:].tolist()
    end = next((at for at, token in enumerate(tokens, 1) if token in eos_ids), len(tokens))
    return tokens[:end]


def eos_ids(model: PreTrainedModel) -> list[int]:
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [ids]


@contextmanager
def counted_forwards(model: PreTrainedModel) -> Iterator[list[int]]:
    """A list of the number of positions of each forward pass of the model, as they happen."""
    sizes: list[int] = []
    handle = model.register_forward_hook(lambda module, args, output: sizes.append(output.logits.shape[1]))
    try:
        yield sizes
    finally:
        handle.remove()


def timed(
    model: PreTrainedModel,
    generate: Callable[..., Any],
    prompt: Prompt,
    decoder: mtpdecode.MTPDecoder | None = None,
    **options: Any,
) -> Run:
    """One prompt through any `generate`: see `timed_batch`."""
    batch = timed_batch(model, generate, [prompt], decoder, **options)
    return Run(batch.tokens[0], batch.seconds, batch.num_forwards)


def timed_batch(
    model: PreTrainedModel,
    generate: Callable[..., Any],
    rows: Sequence[Prompt],
    decoder: mtpdecode.MTPDecoder | None = None,
    **options: Any,
) -> Batch:
    """Some prompts through any `generate`: every contender's tokens, seconds and forwards are taken here and nowhere else.

    decoder  what to ask for the number of forwards; without one they are counted by a hook, which a graph would not see
    """
    inputs = {name: tensor.to(model.device) for name, tensor in left_padded(rows, eos_ids(model)[0] or 0).items()}
    with ExitStack() as stack:
        forwards = [] if decoder else stack.enter_context(counted_forwards(model))
        start = time.perf_counter()
        output = generate(**inputs, **options).cpu()  # on the host, so that all of it has been computed
        seconds = time.perf_counter() - start
    num_forwards = 1 + decoder.metrics.num_rounds if decoder else len(forwards)
    width, ends = inputs["input_ids"].shape[1], eos_ids(model)
    return Batch([new_tokens(row, width, ends) for row in output], seconds, num_forwards)


# ── reporting ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def card(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What was measured on what: hardware, versions, settings."""
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "checkpoint", "vllm")}
    return {
        "model": str(args.checkpoint) if args.checkpoint else MODEL,
        **more,
        "settings": settings,
        "prompts_available": {kind: len(texts) for kind, texts in PROMPTS.items()},
        "hardware": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 2),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def versions() -> dict[str, str]:
    """Of what was measured, and of what it runs on."""
    packages = {name: version(name) for name in PACKAGES}
    return {"mtpdecode": mtpdecode.__version__, "python": platform.python_version(), **packages}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def show_card(result: dict[str, Any]) -> None:
    hardware, versions = result["hardware"], result["versions"]
    print(
        f"{hardware['cpu']}, {hardware['threads']} threads, load {hardware['load_average']}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high}


def show_spread(values: dict[str, float]) -> str:
    return "{median:.2f} [{q1:.2f} {q3:.2f}]".format(**values)


def show_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """The first column to the left, the others to the right; floats with two digits."""
    texts = [list(header), *([f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))


def write(folder: Path, name: str, result: dict[str, Any]) -> None:
    """folder/name.json, with four significant digits behind the point and null for nan."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(plain(result), indent=1) + "\n")
    print(f"wrote {folder / name}.json")


def plain(value: Any) -> Any:
    """As JSON takes it."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
