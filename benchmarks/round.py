"""Where each millisecond of a round goes, compiled and not: parts, bytes that must move, and what the machine's memory allows.

    python -m benchmarks.round

Greedy, one prompt at a time. All cells (compiled or not, and K) take turns on the same prompts, and each run is made twice:
without timers for the round as a whole, and with them for its parts (`timers.py`). The difference is what the timers cost; it is
reported. Of it, what marks inside of a graph take by themselves is in no share; the rest counts as time outside of the forwards.
The floor is the bytes that a round must read over the bandwidth measured in between.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import fmean
from typing import Any, NamedTuple

import torch

import mtpdecode
from benchmarks import common
from benchmarks.common import Prompt
from benchmarks.roofline import bandwidth, readers, round_bytes
from benchmarks.timers import FORWARDS, MARKING, PARTS, Stopwatch, marking, rounds, watching
from mtpdecode.compiled import CompiledRound

EAGER, COMPILED = "eager", "compiled"
TIMERS = {EAGER: watching, COMPILED: marking}
BYTES = 2**28
"""Of the tensors that the bandwidth is measured with, unless --megabytes says otherwise."""


class Cell(NamedTuple):
    """What is measured: a decoder at one K."""

    mode: str
    num_drafted: int
    decoder: mtpdecode.MTPDecoder

    @property
    def name(self) -> str:
        return f"{self.mode} K={self.num_drafted}"


class Row(NamedTuple):
    """One prompt in one cell, means over the rounds.

    ms          a round, without timers     parts  milliseconds by part, with timers
    committed   tokens in the target's cache        tau  tokens a round
    """

    cell: str
    prompt: str
    repeat: int
    num_rounds: int
    tau: float
    committed: float
    ms: float
    parts: dict[str, float]

    @property
    def outside(self) -> float:
        """The share of a round that is outside of the forwards of target and head."""
        inside = sum(self.parts.get(part, 0.0) for part in FORWARDS)
        return 1 - inside / (sum(self.parts.values()) - self.parts.get(MARKING, 0.0))


def cells(decoder: mtpdecode.MTPDecoder, args: argparse.Namespace) -> list[Cell]:
    decoders = {mode: made(decoder, mode, args.backend) for mode in args.modes}
    return [Cell(mode, k, each) for mode, each in decoders.items() for k in args.num_speculative_tokens]


def made(decoder: mtpdecode.MTPDecoder, mode: str, backend: str = "inductor") -> mtpdecode.MTPDecoder:
    """A decoder of the same target and head, compiled or not."""
    another = mtpdecode.MTPDecoder.from_model(decoder.target, head=decoder.head, compiled=mode == COMPILED)
    if mode == COMPILED and backend != "inductor":
        another.step = CompiledRound(backend)
    return another


def means(cell: Cell, prompt: Prompt, num_tokens: int, timed: bool) -> dict[str, float]:
    """Milliseconds of a round by part; without timers all of it is one part. Empty where the text ended in its first round."""
    watch, options = Stopwatch(), {"max_new_tokens": num_tokens, "do_sample": False}
    with TIMERS[cell.mode](cell.decoder, watch) if timed else nullcontext():
        inputs = common.left_padded([prompt], 0)
        found = rounds(cell.decoder, watch, inputs, num_speculative_tokens=cell.num_drafted, **options)
    return {part: 1000 * fmean(each.get(part, 0.0) for each in found) for part in {part for each in found for part in each}}


def measure(cell: Cell, prompt: Prompt, repeat: int, num_tokens: int) -> list[Row]:
    """One row, or none where the text ended in its first round."""
    whole, parts = (means(cell, prompt, num_tokens, timed) for timed in (False, True))
    metrics: Any = cell.decoder.metrics
    counts = metrics.history[0]
    if not parts:
        return []
    committed = len(prompt.ids) - 1 + fmean(sum(counts[:at]) for at in range(1, len(counts)))
    return [Row(cell.name, prompt.text, repeat, len(counts) - 1, metrics.tau, committed, sum(whole.values()), parts)]


def measure_all(
    entries: Sequence[Cell], target: Any, chosen: Sequence[Prompt], args: argparse.Namespace
) -> tuple[list[Row], dict[str, list[float]], list[float]]:
    """-> rows, bytes a second of every way to read memory, and milliseconds a token of `model.generate`; all in turns."""
    rows, pace, device = [], [], target.device
    ways = readers(args.megabytes * 2**20, device)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.repeats * len(chosen)):
        repeat, at = divmod(turn, len(chosen))
        for cell in rotated(entries, turn):
            rows += measure(cell, chosen[at], repeat, args.max_new_tokens)
        run = common.timed(target, target.generate, chosen[at], max_new_tokens=args.max_new_tokens, do_sample=False)
        pace.append(1000 * run.seconds / len(run.tokens))
        for name, entry in ways.items():
            speeds[name].append(bandwidth(entry, device))
        print(f"repeat {repeat + 1} of {args.repeats}, prompt {at + 1} of {len(chosen)}", flush=True)
    return rows, speeds, pace


def rotated(entries: Sequence[Cell], turn: int) -> list[Cell]:
    turn %= len(entries)
    return [*entries[turn:], *entries[:turn]]


def summary(cell: Cell, rows: Sequence[Row], bytes_a_second: float) -> dict[str, Any]:
    """One cell over all prompts and repeats: medians and quartiles of milliseconds."""
    parts = [part for part in PARTS if any(part in row.parts for row in rows)]
    read = round_bytes(cell.decoder, cell.num_drafted, fmean(row.committed for row in rows))
    whole, floor = common.spread([row.ms for row in rows]), 1000 * sum(read.values()) / bytes_a_second
    return {
        "mode": cell.mode,
        "K": cell.num_drafted,
        "tau": sum(row.tau * row.num_rounds for row in rows) / sum(row.num_rounds for row in rows),
        "num_rounds": sum(row.num_rounds for row in rows),
        "ms": whole,
        "parts": {part: common.spread([row.parts.get(part, 0.0) for row in rows]) for part in parts},
        "timers_ms": common.spread([sum(row.parts.values()) - row.ms for row in rows]),
        "outside": common.spread([row.outside for row in rows]),
        "bytes": read,
        "floor_ms": floor,
        "share_of_floor": floor / whole["median"],
    }


def show(summaries: Sequence[dict[str, Any]], bytes_a_second: float) -> None:
    """A column for each cell."""

    def line(name: str, figure: Callable[[dict[str, Any]], object]) -> list[object]:
        return [name, *map(figure, summaries)]

    lines = [line(part, lambda s, part=part: s["parts"][part]["median"] if part in s["parts"] else "-") for part in PARTS]
    lines += [line(f"a round, {name}", lambda s, key=key: s["ms"][key]) for key, name in QUARTILES.items()]
    lines += [
        line("the timers' cost", lambda s: s["timers_ms"]["median"]),
        line("outside of the forwards, %", lambda s: 100 * s["outside"]["median"]),
        line("megabytes to read", lambda s: sum(s["bytes"].values()) / 1e6),
        line(f"floor at {bytes_a_second / 1e9:.1f} GB/s", lambda s: s["floor_ms"]),
        line("floor / a round, %", lambda s: 100 * s["share_of_floor"]),
        line("tokens a round (tau)", lambda s: s["tau"]),
        line("a token", lambda s: s["ms"]["median"] / s["tau"]),
    ]
    common.show_table(["", *(f"{s['mode']} K={s['K']}" for s in summaries)], lines)


QUARTILES = {"median": "median", "q1": "lower quartile", "q3": "upper quartile"}


def settings(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__, num_per_kind=2)
    parser.add_argument("--num-speculative-tokens", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="K")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--modes", nargs="+", default=[EAGER, COMPILED], choices=(EAGER, COMPILED))
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--megabytes", type=int, default=BYTES >> 20, help="to measure the bandwidth with (default: %(default)s)")
    return parser.parse_args(argv)


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def main(argv: Sequence[str] | None = None) -> None:
    args = settings(argv)
    common.start(args)
    decoder, chosen = common.loaded(args, args.dtype)
    entries = cells(decoder, args)
    for cell in entries:
        print(f"warm-up: {cell.name}", flush=True)
        measure(cell, chosen[0], 0, args.max_new_tokens)
    in_warm_up = num_graphs()
    rows, speeds, pace = measure_all(entries, decoder.target, chosen, args)
    late = num_graphs() - in_warm_up
    speed = max(common.spread(values)["median"] for values in speeds.values())
    summaries = [summary(cell, group, speed) for cell in entries if (group := [row for row in rows if row.cell == cell.name])]
    result = common.card(args) | {
        "bandwidth": {name: common.spread(values) for name, values in speeds.items()},
        "plain_ms_per_token": common.spread(pace),
        "graphs": {"in_warm_up": in_warm_up, "while_measuring": late},
        "cells": summaries,
        "rows": [row._asdict() for row in rows],
    }
    common.show_card(result)
    print(f"milliseconds of a round, {args.dtype}: medians over {len(chosen) * args.repeats} runs of each cell, in turns")
    print(f"a token of model.generate takes {common.show_spread(result['plain_ms_per_token'])} ms")
    show(summaries, speed)
    if late:
        print(f"{late} graphs were made while measuring: the runs that they fell into are too long, and medians may be.")
    common.write(args.out, "round", result)
    print(json.dumps({f"{s['mode']} K={s['K']}": round(s["outside"]["median"], 4) for s in summaries}))


if __name__ == "__main__":
    main()
