"""Rounds of real shapes on a GPU, against the bytes that they must move: random weights, no network, under ten minutes.

    python -m benchmarks.gpu                                              on a GPU
    python -m benchmarks.gpu --device cpu --scale tiny --backend eager    everything, small, to see that it runs

Drafts of random heads are never right, so ours are kept by chance, at given rates (`mtpdecode.testing.SyntheticAcceptance`, which
is NOT lossless): milliseconds a round are those of the shapes, tokens a second those of a head with these rates. `use_mtp` has no
such rule: its tokens a second say nothing, its rounds do.

A cell is the difference of two calls, one of few new tokens and one of many: prompts, set-up and reading heads from disk cancel.
What fails, or what there is no time for, is skipped, and the reason is printed and written, as are all results after every model.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping

from benchmarks import common, shapes
from benchmarks.shapes import Built
from benchmarks.waiting import WatchedStep
from mtpdecode import MTPDecoder
from mtpdecode.captured import RECORDS
from mtpdecode.compiled import CompiledRound
from mtpdecode.families import DEEPSEEK_NAMES
from mtpdecode.loading import save_head
from mtpdecode.testing import SyntheticAcceptance

DRAFTED = (0, 1, 3)
RATES = (0.8, 0.65, 0.5)
"""How often draft tokens 1, 2 and 3 are kept: about what published heads of these models reach."""

GRAPH_SECONDS = 60.0
"""What a graph of a real shape is believed to take until one was made."""


class Contender(NamedTuple):
    """A way of decoding.

    generate   takes what `model.generate` takes            decoder  ours, if it is one of ours
    graphs     how many its first calls compile, which takes a minute each on a GPU
    drafted    K, which says what a round must read; None: it changes, or nobody knows
    """

    name: str
    generate: Callable[..., Any]
    decoder: MTPDecoder | None = None
    graphs: int = 0
    drafted: int | None = None


class Skipped(Exception):
    """Why a cell is empty."""


# ── contenders ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def contenders(built: Built, args: argparse.Namespace, folder: Path) -> Iterator[Contender]:
    """What is cheap first, then what is asked about most: when the time is over the rest is left out."""
    target: Any = built.target
    eager = built.decoder()
    yield Contender("generate", target.generate, drafted=0)
    yield from (_ours("ours", eager, k) for k in DRAFTED)
    yield Contender("generate use_mtp", _with_mtp(built, folder))
    if not args.eager:
        compiled = built.decoder()
        compiled.step = CompiledRound(args.backend)
        yield from (_ours("ours compiled", compiled, k, graphs=1) for k in reversed(DRAFTED))
        if args.device.type in RECORDS:
            apart = built.decoder()
            apart.step = CompiledRound(args.backend, is_captured=False)
            yield _ours("ours compiled, launched one by one", apart, DRAFTED[-1], graphs=1)
    yield _auto("ours auto", built)
    if not args.eager:
        static, on_gpu = partial(target.generate, cache_implementation="static"), args.device.type == "cuda"
        name = "generate static compiled" if on_gpu else "generate static"  # transformers compiles its steps on GPUs alone
        yield Contender(name, static, graphs=int(on_gpu), drafted=0)
        yield _auto("ours compiled auto", built, compiled.step)


def _ours(name: str, decoder: MTPDecoder, k: int, graphs: int = 0) -> Contender:
    return Contender(f"{name} K={k}", partial(decoder.generate, **_draft(k)), decoder, graphs, k)


def _auto(name: str, built: Built, compiled: Any = None) -> Contender:
    """Its schedule lives as long as the decoder, so that what one call measures helps the next."""
    decoder = built.decoder(num_speculative_tokens="auto", acceptance=SyntheticAcceptance(RATES))
    decoder.step = compiled or decoder.step
    graphs = len(decoder.options.schedule.choices) if compiled else 0
    return Contender(name, partial(decoder.generate, seed=0), decoder, graphs)


def _draft(k: int) -> dict[str, Any]:
    """Without a draft there is nothing to be kept by chance, and a round is plain decoding."""
    return {"num_speculative_tokens": k, "acceptance": SyntheticAcceptance(RATES) if k else "standard", "seed": 0}


def _with_mtp(built: Built, folder: Path) -> Callable[..., Any]:
    """transformers' own loop reads a head from where the target came from: written there when first asked for."""
    target: Any = built.target

    def generate(**options: Any) -> Any:
        if not folder.exists():
            _write_for_use_mtp(built, folder)
        return target.generate(use_mtp=True, **options)

    return generate


def _write_for_use_mtp(built: Built, folder: Path) -> None:
    """The head alone, under names that transformers finds: DeepSeek's, for its speed is that of its shapes."""
    head, target = built.head, built.target
    if head is None:
        raise Skipped("use_mtp reads heads, and this model drafts with an assistant")
    if target._is_stateful:
        raise Skipped("use_mtp refuses recurrent targets: it would have to take tokens back")
    first = target.config.num_hidden_layers
    spec = head.spec.replace(prefix="model.layers.{n}.", names=DEEPSEEK_NAMES)
    before, head.spec = head.spec, spec
    try:
        save_head(head, folder)
    finally:
        head.spec = before
    target.config._name_or_path = str(folder)
    target.config.num_mtp_layers = head.num_layers
    if getattr(target.config, "layer_types", None):
        target.config.mtp_layer_types = target.config.layer_types[: head.num_layers]
    target._weight_conversions = get_model_conversion_mapping(target)  # 5.17 has it of loaded models alone
    target._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{first}\..*"]


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device, num_bytes: int, num_times: int = 10) -> float:
    """Bytes a second, read and written, of copying a block on the device: the median of some tries behind a first one."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    copy, seconds = torch.empty_like(source), []
    for _ in range(num_times + 1):
        synchronise(device)
        begun = time.perf_counter()
        copy.copy_(source)
        synchronise(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * num_bytes / median(seconds[1:])


def prompt(built: Built, args: argparse.Namespace) -> dict[str, Tensor]:
    """Random tokens, the same for all contenders."""
    size = int(built.target.get_input_embeddings().weight.shape[0])
    ids = torch.randint(3, size, (args.rows, args.prompt), generator=torch.Generator().manual_seed(0)).to(args.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Call(NamedTuple):
    """One call of a contender: its seconds, and the target's forward passes behind the prompt."""

    seconds: float
    num_rounds: int


def call(entry: Contender, built: Built, inputs: dict[str, Tensor], num_tokens: int, device: torch.device) -> Call:
    options = {"max_new_tokens": num_tokens, "do_sample": False}
    counted = [] if entry.decoder or entry.graphs else [built.target]
    synchronise(device)
    begun = time.perf_counter()
    if counted:
        with common.counted_forwards(built.target) as sizes:
            entry.generate(**inputs, **options)
        num_rounds = len(sizes) - 1
    else:
        entry.generate(**inputs, **options)
        num_rounds = entry.decoder.metrics.num_rounds if entry.decoder else num_tokens - 1  # type: ignore[union-attr]
    synchronise(device)
    return Call(time.perf_counter() - begun, num_rounds)


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def measure(entry: Contender, built: Built, args: argparse.Namespace, copied: float) -> dict[str, Any]:
    """One cell: its figures. The first calls are not counted; where they make graphs there is one of both lengths."""
    inputs, few, many = prompt(built, args), args.new_tokens // 4, args.new_tokens
    before, begun = num_graphs(), time.perf_counter()
    for num_tokens in (many, few) if entry.graphs else (few,):
        call(entry, built, inputs, num_tokens, args.device)
    made, warm_up = num_graphs(), time.perf_counter() - begun
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    pairs = [[call(entry, built, inputs, num_tokens, args.device) for num_tokens in (few, many)] for _ in range(args.repeats)]
    seconds = median(long.seconds - short.seconds for short, long in pairs)
    rounds = median(long.num_rounds - short.num_rounds for short, long in pairs)
    return figures(entry, built, args, seconds, rounds, copied) | {
        "calls": pairs,
        "warm_up_seconds": warm_up,
        "graphs": made - before,
        "recompiles": num_graphs() - made,
        "peak_gib": torch.cuda.max_memory_allocated(args.device) / 2**30 if args.device.type == "cuda" else None,
        "waiting": sync_check(entry.decoder, built, args, entry.drafted) if _can_be_watched(entry, args) else None,
    }


def _can_be_watched(entry: Contender, args: argparse.Namespace) -> bool:
    """On the CPU the watch looks at single operations, of which a graph shows none."""
    return entry.decoder is not None and entry.drafted is not None and (args.device.type == "cuda" or not entry.graphs)


def figures(
    entry: Contender, built: Built, args: argparse.Namespace, seconds: float, rounds: float, copied: float
) -> dict[str, Any]:
    """What is told of a cell. share: the bytes that a round must read over what a copy moves in the same time."""
    tokens = args.rows * (args.new_tokens - args.new_tokens // 4)
    if seconds <= 0 or rounds <= 0:
        raise Skipped(f"the longer call took {1000 * seconds:.1f} ms and {rounds} rounds more than the shorter one: noise")
    told = {"ms_per_round": 1000 * seconds / rounds, "rounds_per_second": rounds / seconds, "tokens_per_second": tokens / seconds}
    told["tokens_per_round"] = tokens / args.rows / rounds
    if entry.drafted is None:
        return told | {"bytes": None, "share": None}
    length = args.prompt + (args.new_tokens + args.new_tokens // 4) // 2
    moved = shapes.round_bytes(built, entry.drafted, args.rows, length, built_slot_bytes(built))
    return told | {"bytes": moved, "share": moved * rounds / seconds / copied}


def built_slot_bytes(built: Built) -> int:
    """Of a short call of ours, so that all contenders are held to the same bytes."""
    decoder = built.decoder(num_speculative_tokens=0)
    ids = torch.full((1, 4), 3, device=built.target.device)
    decoder.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    return shapes.slot_bytes(decoder)


def sync_check(decoder: Any, built: Built, args: argparse.Namespace, k: Any) -> str:
    """Rounds in which waiting for the device is an error: how many passed, or what waited."""
    before = decoder.step
    decoder.step = step = WatchedStep(before, args.device)
    try:
        decoder.generate(**prompt(built, args), max_new_tokens=8 * (k + 1), do_sample=False, **_draft(k))
    except RuntimeError as error:
        return f"WAITS: {str(error).splitlines()[0]}"
    finally:
        decoder.step = before
    return f"{step.num_watched} rounds, none waited"


# ── one model after the other ───────────────────────────────────────────────────────────────────────────────────────────────


class Budget:
    """Seconds that are left, and what cells have taken so far: none begins that would end too late.

    graph  seconds that a graph took, or is believed to take before there was one
    """

    def __init__(self, seconds: float, graph: float = 0.0) -> None:
        self.ends, self.taken = time.perf_counter() + seconds, {"plain": 0.0, "graph": graph}

    def share(self, num_models: int) -> Budget:
        """For the next of so many models: half of the time, all of it for the last."""
        part = Budget(max(self.ends - time.perf_counter(), 0.0) / min(num_models, 2))
        part.taken = self.taken
        return part

    @contextmanager
    def cell(self, num_graphs: int = 0) -> Iterator[None]:
        """Around a cell. Raises Skipped where there is no time for it."""
        kind, each = ("graph", num_graphs) if num_graphs else ("plain", 1)
        left, expected = self.ends - time.perf_counter(), self.taken[kind] * each
        if left <= 0 or expected > left:
            raise Skipped(f"no time: {max(left, 0):.0f} s are left for this model, and it would take about {expected:.0f} s")
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.taken[kind] = max(self.taken[kind], (time.perf_counter() - begun) / each)


def cells(built: Built, args: argparse.Namespace, copied: float, budget: Budget, folder: Path) -> Iterator[dict[str, Any]]:
    for entry in contenders(built, args, folder):
        try:
            with budget.cell(entry.graphs), warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                cell = measure(entry, built, args, copied)
            cell["warnings"] = sorted({str(each.message).splitlines()[0] for each in heard if each.category is UserWarning})
        except Exception as error:  # one contender's trouble is no reason to lose the others' figures
            cell = {"skipped": _reason(error)}
        yield {"contender": entry.name} | cell
        if entry.decoder:
            entry.decoder.release()


def _reason(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return first if isinstance(error, Skipped) else f"{type(error).__name__}: {first}"


def run_model(name: str, args: argparse.Namespace, copied: float, budget: Budget) -> dict[str, Any]:
    """Everything about one model."""
    shape = shapes.SHAPES[name]
    print(f"\n{name}: {shape.source}", flush=True)
    dtype = torch.float32 if args.scale == "tiny" else torch.bfloat16
    try:
        with budget.cell():
            built = shapes.build(shape, args.device, dtype, args.scale)
    except Exception as error:
        print(f"  skipped: {_reason(error)}")
        return {"model": name, "source": shape.source, "skipped": _reason(error)}
    told = {"model": name, "source": shape.source, "gib": _gib(built.target), "drafter_gib": _gib(built.drafter)}
    with tempfile.TemporaryDirectory() as scratch:
        told["cells"] = [_shown(cell) for cell in cells(built, args, copied, budget, Path(scratch) / "head")]
    return told


def _gib(module: torch.nn.Module) -> float:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters()) / 2**30


def _shown(cell: dict[str, Any]) -> dict[str, Any]:
    """A line as soon as it is known: a run may be cut."""
    if "skipped" in cell:
        print(f"  {cell['contender']:<26} skipped: {cell['skipped']}", flush=True)
        return cell
    share = "     " if cell["share"] is None else f"{cell['share']:5.2f}"
    peak = "" if cell["peak_gib"] is None else f"  {cell['peak_gib']:5.1f} GiB"
    graphs = f"  {cell['graphs']} graphs, {cell['recompiles']} recompiles" if cell["graphs"] else ""
    pace = (
        f"{cell['ms_per_round']:9.2f} ms/round{cell['rounds_per_second']:9.1f} rounds/s{cell['tokens_per_second']:9.1f} tokens/s"
    )
    waits = f"  {cell['waiting']}" if cell["waiting"] else ""
    print(f"  {cell['contender']:<26}{pace}  share {share}{peak}{graphs}{waits}", flush=True)
    return cell


def _release(device: torch.device) -> None:
    """The next model needs the room."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="default: %(default)s")
    parser.add_argument("--scale", choices=("real", "tiny"), default="real", help="tiny: every size shrunk")
    parser.add_argument("--models", nargs="+", choices=list(shapes.SHAPES), default=list(shapes.SHAPES))
    parser.add_argument("--rows", type=int, default=1, help="batch size (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of the longer call; a quarter in the shorter (default: 64)")
    parser.add_argument("--repeats", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=9.0, help="no cell begins that would end later (default: %(default)s)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--eager", action="store_true", help="nothing that compiles")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for the JSON file (default: benchmarks/results)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(arguments)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "--device cuda was asked for; there is none. Small, on the CPU: --device cpu --scale tiny --backend eager"
        )
    common.start(args)
    budget = Budget(60 * args.minutes, GRAPH_SECONDS if args.scale == "real" else 0.0)
    copied = bandwidth(args.device, 2**31 if args.scale == "real" else 2**22)
    result = card(args, copied)
    print(
        f"{result['device']}: a copy moves {copied / 1e9:.0f} GB/s; acceptance is SYNTHETIC, {RATES}, and no text is the target's"
    )
    for at, name in enumerate(args.models):
        result["models"].append(run_model(name, args, copied, budget.share(len(args.models) - at)))
        common.write(args.out, "gpu", result)
        _release(args.device)
    print(json.dumps(common.plain(headline(result))))
    return result


def card(args: argparse.Namespace, copied: float) -> dict[str, Any]:
    """What was measured on what."""
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else common.cpu_name()
    settings = {key: value if isinstance(value, (int, float, list)) else str(value) for key, value in vars(args).items()}
    settings.pop("out")
    return {
        "device": name,
        "bandwidth": copied,
        "acceptance": {"rule": "SyntheticAcceptance: NOT lossless", "rates": RATES},
        "settings": settings,
        "versions": common.versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "models": [],
    }


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds a round of every cell."""
    return {
        model["model"]: {cell["contender"]: cell.get("ms_per_round") for cell in model.get("cells", [])}
        for model in result["models"]
    }


if __name__ == "__main__":
    main()
