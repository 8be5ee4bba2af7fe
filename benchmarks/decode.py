"""Wall clock of decoding: `model.generate` in several ways, and mtpdecode, eager and compiled, at several K.

    python -m benchmarks.decode
    python -m benchmarks.decode --compiled --batch-sizes 1 8 --temperatures 0 1 --contexts 0 2048 --only "K=*" "compiled*"

A cell is a dtype, a batch size, a temperature and a context length. In every cell all contenders run the same model in memory on
the same batches. Per batch and repeat they take turns, each time starting with another one, so that a slow minute of the machine
is felt by all; every ratio is taken within one batch and repeat. Tokens are counted the same way for all. Cells are added to the
ones that the JSON file holds, and replace those of the same name. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import mtpdecode
from benchmarks import beside_vllm, common, glm_layout
from benchmarks.acceptance import sampling
from benchmarks.batches import Texts, longest
from benchmarks.common import Batch, Prompt
from benchmarks.contenders import PLAIN, PLAIN_NAMES, Contender, chosen, contenders, is_chosen
from benchmarks.prompts import PROMPTS


class Cell(NamedTuple):
    """What is varied. context: tokens that prompts are lengthened to, about; 0: as they are."""

    dtype: str
    batch_size: int
    temperature: float
    context: int

    def __str__(self) -> str:
        manner = f"temperature {self.temperature:g}" if self.temperature else "greedy"
        return f"{self.dtype}, batch {self.batch_size}, {manner}, context {self.context or 'as it is'}"


class Row(NamedTuple):
    """One measurement: a contender, a batch, a repeat.

    ratio, ratio_to_best_plain  how many times the speed of `generate`, and of the fastest plain way of the cell, here and now
    identical   the texts are those of `generate`; None when sampled: nobody draws the same numbers
    tau         tokens per row and target forward that appends tokens; None: not known
    accepted    by draft position, as in `Metrics.acceptance_rate`; None: not known
    graphs      compiled meanwhile: each took longer than what was to be timed
    """

    contender: str
    kind: str
    batch: int
    repeat: int
    num_tokens: int
    num_forwards: int
    ms_per_token: float
    ratio: float
    identical: bool | None
    tau: float | None
    accepted: list[float] | None
    graphs: int = 0
    ratio_to_best_plain: float = float("nan")


class Loaded(NamedTuple):
    """A model in one dtype, and everybody who decodes it. folder: its checkpoint, the head in it."""

    target: PreTrainedModel
    entries: list[Contender]
    texts: Texts
    folder: Path


def load(args: argparse.Namespace, dtype: str, folder: Path) -> Loaded:
    """The preset or --checkpoint, its target read back from one checkpoint with the head in it, as `use_mtp` needs it."""
    if args.checkpoint:
        decoder, tokenizer = mtpdecode.MTPDecoder.from_pretrained(args.checkpoint, dtype=dtype), None
    else:
        decoder, tokenizer = mtpdecode.load(common.MODEL, dtype=dtype)
    decoder.save_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    prepare_for_use_mtp(target)
    entries = contenders(mtpdecode.MTPDecoder.from_model(target, head=folder), args.num_speculative_tokens, args.backend)
    return Loaded(target, chosen(entries, args.only, args.compiled, args.random_head), Texts(target, tokenizer), folder)


def prepare_for_use_mtp(target: PreTrainedModel) -> None:
    """transformers finds MTP weights by names that it lists per model class; Llama has none, so this instance gets its own."""
    first = target.config.num_hidden_layers
    target._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{first}\..*"]


def rotated(items: Sequence[Contender], turn: int) -> list[Contender]:
    turn %= len(items)
    return [*items[turn:], *items[:turn]]


# ── one cell ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Measuring:
    """One cell on its way: who takes part, what was found, who was left out and why."""

    def __init__(self, loaded: Loaded, cell: Cell, args: argparse.Namespace) -> None:
        self.loaded, self.cell, self.args = loaded, cell, args
        num_texts, length = args.num_per_kind * len(PROMPTS), args.max_new_tokens
        self.batches = loaded.texts.batches(cell.batch_size, num_texts, cell.context, room=length + ROOM)
        self.longest = longest(self.batches) + length
        self.options = {"max_new_tokens": length, **sampling(cell.temperature)}
        self.entries = [e for e in loaded.entries if e.most_rows is None or cell.batch_size <= e.most_rows]
        self.rows: list[Row] = []
        self.metrics: dict[str, list[mtpdecode.Metrics]] = {}
        self.left_out: dict[str, str] = {}

    def warm_up(self) -> None:
        """Who fails is left out, and the reason kept; without plain decoding there is nothing to compare with."""
        for entry in tuple(self.entries):
            print(f"  warm-up: {entry.name}", flush=True)
            try:
                entry.warm_up(self.loaded.target, self.batches, self.longest, **self.options)
            except Exception as error:
                if entry.name == PLAIN:
                    raise
                self._leave_out(entry.name, error)
                self.entries.remove(entry)
        for entry in self.entries:  # once more: the first call of one may have changed what another one's graph relied on
            entry.warm_up(self.loaded.target, self.batches[:1], self.longest, is_known=True, **self.options)

    def _leave_out(self, name: str, error: Exception) -> None:
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        self.left_out[name] = f"{type(error).__name__}: {reason}"
        print(f"  left out: {name} ({self.left_out[name]})", flush=True)

    def measure(self) -> None:
        for repeat in range(self.args.repeats):
            for at, rows in enumerate(self.batches):
                self._measure_batch(at, rows, repeat)
                print(f"  repeat {repeat + 1} of {self.args.repeats}, batch {at + 1} of {len(self.batches)}", flush=True)

    def _measure_batch(self, at: int, rows: Sequence[Prompt], repeat: int) -> None:
        """Every contender once."""
        runs: dict[str, tuple[Batch, mtpdecode.Metrics | None, int]] = {}
        for entry in rotated(self.entries, repeat + at):
            before = num_graphs()
            batch = entry.run(self.loaded.target, rows, self.longest, seed=repeat, **self.options)
            runs[entry.name] = batch, entry.decoder.metrics if entry.decoder else None, num_graphs() - before
        plain = runs[PLAIN][0]
        for entry in self.entries:
            batch, metrics, graphs = runs[entry.name]
            self.rows.append(self._row(entry.name, at, repeat, batch, plain, metrics)._replace(graphs=graphs))
            if metrics:
                self.metrics.setdefault(entry.name, []).append(metrics)
            if graphs:
                print(f"  {entry.name} compiled {graphs} graphs while it was timed", flush=True)

    def _row(self, name: str, at: int, repeat: int, run: Batch, plain: Batch, metrics: mtpdecode.Metrics | None) -> Row:
        kinds = {prompt.kind for prompt in self.batches[at]}
        same = None if self.cell.temperature else run.tokens == plain.tokens
        accepted = metrics.acceptance_rate() if metrics else None
        counts, kind = (num_tokens(run), run.num_forwards), kinds.pop() if len(kinds) == 1 else "mixed"
        times = pace(plain) / pace(run)
        return Row(name, kind, at, repeat, *counts, pace(run), times, same, metrics.tau if metrics else tau(run), accepted)

    def measure_vllm(self) -> None:
        """In processes of its own, after the others; its ratios are to what `generate` took before."""
        plain = {(row.batch, row.repeat): row for row in self.rows if row.contender == PLAIN}
        for name in beside_vllm.NAMES:
            if not is_chosen(name, self.args.only, self.args.compiled, self.args.random_head):
                continue
            try:
                found = self._of_vllm(name)
            except (RuntimeError, OSError, ValueError) as error:
                self._leave_out(name, error)
                continue
            for run in found["runs"]:
                beside, longest = plain[run["batch"], run["repeat"]], max(map(len, run["tokens"]))
                batch = Batch(run["tokens"], run["seconds"], longest)
                row = self._row(name, run["batch"], run["repeat"], batch, batch, None)
                kept = {"num_forwards": 0, "identical": None, "tau": 1.0 + sum(found["kept"]), "accepted": found["kept"]}
                self.rows.append(row._replace(ratio=beside.ms_per_token / pace(batch), **kept))

    def _of_vllm(self, name: str) -> dict[str, Any]:
        """It drafts with families that it knows by name: where it is to draft it is given the same weights in another layout."""
        whole, folder, args = self.loaded.folder, self.loaded.folder.with_name(name.replace(" ", "-")), self.args
        if not folder.exists() and name.endswith("mtp"):
            glm_layout.write(whole, folder)
        elif not folder.exists():
            self.loaded.target.save_pretrained(folder)  # of a head in the same files it would know nothing
        ids = [[prompt.ids for prompt in rows] for rows in self.batches]
        asked = vars(args) | self.cell._asdict()
        job = beside_vllm.job(folder, ids, common.eos_ids(self.loaded.target), **asked)
        return beside_vllm.measured(name, job, args.vllm_drafts, args.vllm)


ROOM = 64
"""Positions that are left free behind the longest text: speculation writes past its end."""


def num_graphs() -> int:
    """How many graphs torch has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def num_tokens(run: Batch) -> int:
    return sum(map(len, run.tokens))


def pace(run: Batch) -> float:
    """Milliseconds a token, all rows together."""
    return 1000 * run.seconds / num_tokens(run)


def tau(run: Batch) -> float:
    """Of transformers' ways of decoding, whose prompt's forward appends a token: a row that ends early waits for the others."""
    return num_tokens(run) / sum(min(len(row), run.num_forwards) for row in run.tokens)


# ── what a cell comes to ───────────────────────────────────────────────────────────────────────────────────────────────────


def best_plain(rows: Sequence[Row]) -> str:
    """Who decodes plainly and fastest, by the median of the cell: the best of each repeat would be its luckiest."""
    paces = {name: median(row.ms_per_token for row in of(rows, name)) for name in PLAIN_NAMES if of(rows, name)}
    return min(paces, key=lambda name: paces[name])


def of(rows: Sequence[Row], contender: str) -> list[Row]:
    return [row for row in rows if row.contender == contender]


def beside_best(rows: Sequence[Row], best: str) -> list[Row]:
    """The rows, with ratio_to_best_plain."""
    paces = {(row.batch, row.repeat): row.ms_per_token for row in of(rows, best)}
    return [row._replace(ratio_to_best_plain=paces[row.batch, row.repeat] / row.ms_per_token) for row in rows]


def summary(rows: Sequence[Row], calls: Sequence[mtpdecode.Metrics] = ()) -> dict[str, Any]:
    """One contender over all batches and repeats of a cell. calls: their metrics, if it is one of ours."""
    known = [row for row in rows if row.tau is not None]
    forwards = sum(row.num_tokens / row.tau for row in known if row.tau)
    kinds = {row.kind for row in rows}
    return {
        "contender": rows[0].contender,
        "ms_per_token": common.spread([row.ms_per_token for row in rows]),
        "ratio": common.spread([row.ratio for row in rows]),
        "ratio_to_best_plain": common.spread([row.ratio_to_best_plain for row in rows]),
        "ratio_by_kind": {kind: median(row.ratio for row in common.of_kind(rows, kind)) for kind in PROMPTS if kind in kinds},
        "tau": sum(row.num_tokens for row in known) / forwards if known else None,
        "accepted": mtpdecode.Metrics.pooled(calls).acceptance_rate() if calls else None,
        "identical": None if rows[0].identical is None else sum(bool(row.identical) for row in rows),
        "texts": len(rows),
        "graphs": sum(row.graphs for row in rows),
    }


def measured(loaded: Loaded, cell: Cell, args: argparse.Namespace, with_vllm: bool) -> dict[str, Any]:
    """One cell, as it stands in the JSON file: its card, a summary per contender, and every single measurement."""
    print(cell, flush=True)
    measuring = Measuring(loaded, cell, args)
    measuring.warm_up()
    measuring.measure()
    if with_vllm:
        measuring.measure_vllm()
    best = best_plain(measuring.rows)
    rows = beside_best(measuring.rows, best)
    names = dict.fromkeys(row.contender for row in rows)
    return common.card(args) | {
        **cell._asdict(),
        "best_plain": best,
        "contenders": [summary(of(rows, name), measuring.metrics.get(name, ())) for name in names],
        "left_out": measuring.left_out,
        "longest_prompt": longest(measuring.batches),
        "batches": [[prompt.text for prompt in each] for each in measuring.batches],
        "rows": [row._asdict() for row in rows],
    }


# ── all of them ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return (cell["model"], *(cell[name] for name in Cell._fields))


def merged(folder: Path, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """These cells, and those of decode.json that were not measured again."""
    file = folder / "decode.json"
    known = json.loads(file.read_text())["cells"] if file.exists() else []
    fresh = {key(cell) for cell in cells}
    return {"cells": [*(cell for cell in known if key(cell) not in fresh), *cells]}


def show(cell: dict[str, Any]) -> None:
    kinds = cell["contenders"][0]["ratio_by_kind"]
    print(f"\n{Cell(*(cell[name] for name in Cell._fields))}: median [quartiles]; the best plain way is {cell['best_plain']}")
    rows = []
    for s in cell["contenders"]:
        figures = [common.show_spread(s[name]) for name in ("ms_per_token", "ratio", "ratio_to_best_plain")]
        rates = " ".join(f"{rate:.2f}" for rate in s["accepted"] or ()) or "-"
        identical = "-" if s["identical"] is None else f"{s['identical']}/{s['texts']}"
        rows.append(
            [s["contender"], *figures, *(s["ratio_by_kind"].get(kind, "-") for kind in kinds), s["tau"], rates, identical]
        )
    header = ["", "ms/token", "times generate", "times best plain", *kinds, "tau", "accepted by position", "identical"]
    common.show_table(header, rows)
    for name, reason in cell["left_out"].items():
        print(f"left out: {name} ({reason})")


def medians(cell: dict[str, Any]) -> dict[str, list[float]]:
    """contender -> times `generate`, times the best plain way."""
    ratios = ("ratio", "ratio_to_best_plain")
    return {each["contender"]: [round(each[name]["median"], 3) for name in ratios] for each in cell["contenders"]}


def grid(args: argparse.Namespace, with_vllm: bool) -> Iterator[dict[str, Any]]:
    """Every cell. The contexts grow, for transformers' static caches never shrink while a model is in memory."""
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory() as scratch:  # use_mtp reads the head from there in every call
            loaded = load(args, dtype, Path(scratch) / "checkpoint")
            for context in sorted(args.contexts):
                for batch_size in args.batch_sizes:
                    for temperature in args.temperatures:
                        yield measured(loaded, Cell(dtype, batch_size, temperature, context), args, with_vllm)


def options() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, num_per_kind=4)
    add = parser.add_argument
    add("--num-speculative-tokens", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="K")
    add("--batch-sizes", type=int, nargs="+", default=[1], metavar="B", help="default: 1")
    add("--temperatures", type=float, nargs="+", default=[0.0], metavar="T", help="0 is greedy (default: 0)")
    add(
        "--contexts",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="lengthen prompts to about N tokens (default: as they are)",
    )
    add("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=("bfloat16", "float32"))
    add("--repeats", type=int, default=2, help="default: %(default)s")
    add("--only", nargs="+", default=[], metavar="PATTERN", help='contenders by name, beside generate: "K=*" "compiled auto"')
    add("--compiled", action="store_true", help="compiled contenders too: every graph takes about a minute to make")
    add("--random-head", action="store_true", help="auto with a head that knows nothing, too")
    add("--vllm", default=sys.executable, metavar="PYTHON", help="the Python that vLLM is installed for (default: this one)")
    add("--vllm-drafts", type=int, default=1, metavar="K", help="draft tokens of vLLM's (default: %(default)s)")
    add("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    return parser


def main() -> None:
    args = options().parse_args()
    common.start(args)
    cells: list[dict[str, Any]] = []
    for cell in grid(args, beside_vllm.is_installed(args.vllm)):
        cells.append(cell)
        common.write(args.out, "decode", merged(args.out, cells))  # after every cell: a long run may be ended at any time
    common.show_card(cells[0])
    for cell in cells:
        show(cell)
    print(json.dumps({", ".join(str(cell[name]) for name in Cell._fields): medians(cell) for cell in cells}))


if __name__ == "__main__":
    main()
