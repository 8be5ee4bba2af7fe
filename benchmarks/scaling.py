"""What a round costs against context, batch and K, with fitted exponents, and which of its parts grow.

    python -m benchmarks.scaling

The texts are random tokens. Prompts of all contexts (or batches) are read once and stay open side by side; then they take turns,
a round of every K in each turn, so that a slow minute of the machine hits all alike. Kinds of time:

    target: attention    what the target's own attention takes; with the context it must grow
    head: attention      the same of the head
    other forwards       what else target and head compute: their products, above all
    ours                 everything else: masks, writing keys and values, acceptance, stopping, the loop

The plot shows them, and the affine fits a + b * context say how much each grows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import mtpdecode
from benchmarks import common
from benchmarks.round import COMPILED, EAGER, made
from benchmarks.timers import ATTENTION, FORWARDS, HOST, STEPS, TARGET, Stopwatch, marking, watching
from mtpdecode.metrics import Metrics

WHOLE, OTHERS, OURS = "a round", "other forwards", "ours"
ATTENTIONS = (ATTENTION[TARGET], ATTENTION[STEPS])
KINDS = {EAGER: (WHOLE, *ATTENTIONS, OTHERS, OURS), COMPILED: (WHOLE, OTHERS, OURS)}
"""What is fitted and drawn. In a graph the attention is not told apart: the forwards hold it."""
NO_TOKEN = -1
"""An end token that is never written."""


class Place(NamedTuple):
    """Where rounds are measured: rows, and tokens in each of their prompts."""

    num_rows: int
    context: int


class Row(NamedTuple):
    """One K at one place: medians over the rounds, in milliseconds.

    length  tokens of a row when a round begins, on average     parts  as in `timers.py`     sums  the kinds of time above
    """

    mode: str
    axis: str
    num_rows: int
    context: int
    length: float
    num_drafted: int
    num_rounds: int
    sums: dict[str, float]
    spread: dict[str, float]
    parts: dict[str, float]


class Turns(mtpdecode.DraftSchedule):
    """Every K in turn. The first round of a turn is not counted: the head catches up behind a round that drafted nothing, and
    another text was decoded in between.

        K (1) 1 2 3 0 | (1) 1 2 3 0 | ...
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.choices = tuple(sorted(set(lengths)))
        counted = sorted(self.choices, key=lambda k: k or math.inf)
        self.turn = [(counted[0], False), *((k, True) for k in counted)]
        self._asked = 0

    def next_length(self, metrics: Metrics) -> int:
        self._asked += 1
        return self.turn[(self._asked - 1) % len(self.turn)][0]


class Stream:
    """One place, open: its prompt read, and its rounds one by one."""

    def __init__(self, decoder: mtpdecode.MTPDecoder, place: Place, lengths: Sequence[int], num_turns: int) -> None:
        self.place, self.schedule, self.appended = place, Turns(lengths), 0
        num_rounds = (num_turns + 1) * len(self.schedule.turn)
        prompts = [common.random_prompt(decoder.target, "random", place.context, seed) for seed in range(place.num_rows)]
        self._stream = decoder.stream(
            **common.left_padded(prompts, 0),
            num_speculative_tokens=self.schedule,
            max_new_tokens=num_rounds * (max(lengths) + 1),
            do_sample=False,
            eos_token_id=NO_TOKEN,
        )
        for _ in self.schedule.turn:  # the prompt, and a turn to warm up
            self._next()

    def turn(self, watch: Stopwatch) -> Iterator[tuple[int, dict[str, float], float]]:
        """A round of every K -> (K, seconds by part, tokens of a row when it began)."""
        for k, counts in self.schedule.turn:
            length = self.place.context + self.appended / self.place.num_rows
            watch.start(HOST)
            self._next()
            seconds = watch.stop()
            if counts:
                yield k, seconds, length

    def _next(self) -> None:
        self.appended += sum(map(len, next(self._stream).tokens))


def sums(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds of a round by part -> by kind of time."""
    attention = {part: seconds.get(part, 0.0) for part in ATTENTIONS}
    whole, others = sum(seconds.values()), sum(seconds.get(part, 0.0) for part in FORWARDS)
    return {WHOLE: whole, **attention, OTHERS: others, OURS: whole - others - sum(attention.values())}


def measure(decoder: mtpdecode.MTPDecoder, mode: str, axis: str, places: Sequence[Place], args: argparse.Namespace) -> list[Row]:
    """All places of one axis, in turns. The watch stands still while prompts are read and graphs are made."""
    watch, found = Stopwatch(), defaultdict(list)
    timers = marking(decoder, watch) if mode == COMPILED else watching(decoder, watch, attention=True)
    with timers:
        streams = [Stream(decoder, place, args.num_speculative_tokens, args.turns) for place in places]
        for stream in args.turns * streams:
            for k, seconds, length in stream.turn(watch):
                found[stream.place, k].append((seconds, length))
    print(f"{mode}: {axis} measured", flush=True)
    return [_row(mode, axis, place, k, found[place, k]) for place, k in sorted(found)]


def _row(mode: str, axis: str, place: Place, k: int, rounds: Sequence[tuple[dict[str, float], float]]) -> Row:
    each = [seconds for seconds, _ in rounds]
    kinds = [sums(seconds) for seconds in each]
    return Row(
        mode,
        axis,
        *place,
        fmean(length for _, length in rounds),
        k,
        len(rounds),
        {kind: 1000 * median(found[kind] for found in kinds) for kind in KINDS[mode]},
        common.spread([1000 * found[WHOLE] for found in kinds]),
        {part: 1000 * median(found.get(part, 0.0) for found in each) for part in sorted({p for found in each for p in found})},
    )


# ── fits ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(a, b) of a + b * x, by least squares; nan where there are not two different x."""
    middle, height = fmean(xs), fmean(ys)
    width = sum((x - middle) ** 2 for x in xs)
    slope = sum((x - middle) * (y - height) for x, y in zip(xs, ys, strict=True)) / width if width else math.nan
    return height - slope * middle, slope


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """p of c * x ** p, by least squares of the logarithms; nan where something takes no time."""
    return line([math.log(x) for x in xs], [math.log(y) for y in ys])[1] if min(ys) > 0 else math.nan


def fits(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For every mode and K, and each kind of time: how it grows with the context and with the batch; and a round with K."""
    found = []
    for mode, k in sorted({(row.mode, row.num_drafted) for row in rows}):
        chosen = [row for row in rows if (row.mode, row.num_drafted) == (mode, k)]
        found += [{"mode": mode, "K": k, "kind": kind, **_grown(chosen, kind)} for kind in KINDS[mode]]
    return found


def _grown(rows: Sequence[Row], kind: str) -> dict[str, float]:
    """Of one mode and K. constant, per_1000_tokens: of the affine fit, ms. growth: what that adds from the first context to the
    last, as a share of the whole round at the first."""
    long = sorted((row for row in rows if row.axis == "context"), key=lambda row: row.length)
    wide = [row for row in rows if row.axis == "batch"]
    lengths, costs = [row.length for row in long], [row.sums[kind] for row in long]
    constant, slope = line(lengths, costs)
    return {
        "context_exponent": exponent(lengths, costs),
        "constant": constant,
        "per_1000_tokens": 1000 * slope,
        "growth": slope * (lengths[-1] - lengths[0]) / long[0].sums[WHOLE],
        "batch_exponent": exponent([row.num_rows for row in wide], [row.sums[kind] for row in wide]),
    }


def window_exponents(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How a round grows with K + 1, the tokens of the target's window, at every place."""
    found = []
    for mode, axis, num_rows, context in sorted({row[:4] for row in rows}):
        chosen = [row for row in rows if row[:4] == (mode, axis, num_rows, context)]
        fitted = exponent([row.num_drafted + 1 for row in chosen], [row.sums[WHOLE] for row in chosen])
        found.append({"mode": mode, "axis": axis, "num_rows": num_rows, "context": context, "exponent": fitted})
    return found


# ── what people look at ────────────────────────────────────────────────────────────────────────────────────────────────────


def draw(rows: Sequence[Row], path: Path) -> None:
    """Three panels: kinds of time by context at the largest K, a round by batch for each K, a round by K for each context."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    deepest, contexts = max(row.num_drafted for row in rows), sorted({row.context for row in rows if row.axis == "context"})
    last = [row for row in rows if row.num_drafted == deepest]
    _lines(panels[0], last, "context", "context", {kind: (kind, {}) for kind in KINDS[EAGER]})
    drafted = {f"K = {k}": (WHOLE, {"num_drafted": k}) for k in sorted({row.num_drafted for row in rows})}
    _lines(panels[1], rows, "batch", "num_rows", drafted)
    _lines(panels[2], rows, "context", "num_drafted", {f"context {n}": (WHOLE, {"context": n}) for n in contexts})
    titles = (f"parts of a round, one row, K = {deepest}", f"a round, context {rows[0].context}", "a round, one row")
    for panel, title, label in zip(panels, titles, ("tokens in the text", "rows", "K"), strict=True):
        panel.set(title=title, xlabel=label, ylabel="ms")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    for panel in panels[:2]:
        panel.loglog()
        panel.set_xticks(ticks := sorted({int(x) for line in panel.lines for x in line.get_xdata()}), ticks)
        panel.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
    panels[2].set(ylim=(0, None), xticks=sorted({row.num_drafted for row in rows}))
    figure.suptitle("full lines: compiled (attention is in the forwards), dashed: not compiled", fontsize="medium")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _lines(panel: Any, rows: Sequence[Row], axis: str, x: str, wanted: dict[str, tuple[str, dict[str, int]]]) -> None:
    """A colour for each of `wanted`: a name, the kind of time, and what its rows have; full if compiled, dashed if not."""
    for number, (name, (kind, values)) in enumerate(wanted.items()):
        label: str | None = name
        for mode, style in ((COMPILED, "-"), (EAGER, "--")):
            chosen = [row for row in rows if (row.axis, row.mode) == (axis, mode) and kind in row.sums]
            chosen = [row for row in chosen if all(row._asdict()[key] == value for key, value in values.items())]
            points = sorted((getattr(row, x), row.sums[kind]) for row in chosen)
            if points:
                panel.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=f"C{number}", label=label)
                label = None


def show(rows: Sequence[Row], fitted: Sequence[dict[str, Any]]) -> None:
    for axis in ("context", "batch"):
        print(f"\nmilliseconds of a round by {axis}: median [quartiles], and its kinds")
        lines = [
            [
                f"{r.mode} K={r.num_drafted}",
                r.num_rows,
                r.context,
                common.show_spread(r.spread),
                *(r.sums.get(k, "-") for k in KINDS[EAGER][1:]),
            ]
            for r in rows
            if r.axis == axis
        ]
        common.show_table(["", "rows", "context", WHOLE, *KINDS[EAGER][1:]], lines)
    print(
        "\nhow that grows: exponents, and constant + slope * context in ms; growth: first to last context, % of the first round"
    )
    header = ["", "kind", "context^", "constant", "per 1000 tokens", "growth %", "rows^"]
    lines = [
        [
            f"{f['mode']} K={f['K']}",
            f["kind"],
            f["context_exponent"],
            f["constant"],
            f["per_1000_tokens"],
            100 * f["growth"],
            f["batch_exponent"],
        ]
        for f in fitted
    ]
    common.show_table(header, lines)


def settings(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__, num_per_kind=0)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048, 8192], metavar="N", help="of one row")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], metavar="B", help="with the first of the contexts")
    parser.add_argument("--num-speculative-tokens", type=int, nargs="+", default=[0, 1, 3, 5], metavar="K")
    parser.add_argument("--turns", type=int, default=9, help="rounds of every K at every place (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--modes", nargs="+", default=[EAGER, COMPILED], choices=(EAGER, COMPILED))
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = settings(argv)
    common.start(args)
    decoder, _ = common.loaded(args, args.dtype)
    axes = {"context": [Place(1, n) for n in args.contexts], "batch": [Place(b, args.contexts[0]) for b in args.batches]}
    rows: list[Row] = []
    for mode in args.modes:
        measured = made(decoder, mode, args.backend)
        for axis, places in axes.items():
            rows += measure(measured, mode, axis, places, args)
    fitted = fits(rows)
    result = common.card(args) | {"fits": fitted, "exponents_of_K_plus_1": window_exponents(rows)}
    result["rows"] = [row._asdict() for row in rows]
    common.show_card(result)
    show(rows, fitted)
    common.write(args.out, "scaling", result)
    if importlib.util.find_spec("matplotlib"):
        draw(rows, args.out / "scaling.png")
    print(json.dumps({f"{f['mode']} K={f['K']}": round(f["growth"], 4) for f in fitted if f["kind"] == OURS}))


if __name__ == "__main__":
    main()
