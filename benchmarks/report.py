"""Write the README's measured section, and docs/measured.md, from results/decode.json and results/acceptance.json.

python -m benchmarks.report
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import beside_vllm
from benchmarks.common import RESULTS

ROOT = Path(__file__).parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "measured.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Markdown; floats with two digits."""
    header = list(header)
    lines = [header, ["---"] * len(header)]
    lines += [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def machine(result: dict[str, Any]) -> str:
    hardware, versions = result["hardware"], result["versions"]
    return f"{hardware['cpu']}, {hardware['threads']} threads, torch {versions['torch']}, transformers {versions['transformers']}"


def spread(values: dict[str, float]) -> str:
    return "{median:.2f} [{q1:.2f}, {q3:.2f}]".format(**values)


def wall_clock(result: dict[str, Any]) -> str:
    """One table per dtype for single prompts as they are, greedy; a small one for all other cells."""
    single = [cell for cell in result["cells"] if is_single(cell)]
    others = [cell for cell in result["cells"] if not is_single(cell)]
    return "".join(map(contenders, single)) + (grid(others) if others else "")


def is_single(cell: dict[str, Any]) -> bool:
    return (cell["batch_size"], cell["temperature"], cell["context"]) == (1, 0, 0)


def contenders(cell: dict[str, Any]) -> str:
    """Everybody in one cell: milliseconds per token and times plain, median and quartiles."""
    texts, tokens = cell["contenders"][0]["texts"], cell["settings"]["max_new_tokens"]
    turns = "interleaved but for vLLM" if any(c["contender"] in beside_vllm.NAMES for c in cell["contenders"]) else "interleaved"
    title = f"Wall clock, batch 1, greedy, {cell['dtype']}, {texts} texts of up to {tokens} tokens, {turns} ({machine(cell)})"
    kinds = list(cell["contenders"][0]["ratio_by_kind"])
    ratios = ("ratio", "ratio_to_best_plain")
    rows = [
        (c["contender"], spread(c["ms_per_token"]), *(spread(c[name]) for name in ratios), *c["ratio_by_kind"].values(), *kept(c))
        for c in cell["contenders"]
    ]
    header = ["", "ms/token", "times plain", f"times {cell['best_plain']}", *kinds, "tau", "accepted by position"]
    return f"{title}:\n\n" + table(header, rows) + "\n"


def kept(contender: dict[str, Any]) -> tuple[float | str, str]:
    """What a speed rests on: tokens per forward, and the acceptance by draft position."""
    rates = " ".join("-" if rate is None else f"{rate:.2f}" for rate in contender["accepted"] or ())
    return "" if contender["tau"] is None else contender["tau"], rates


IN_GRID = (
    *("generate", "generate static compiled", "generate use_mtp", "generate prompt lookup", "mtpdecode auto"),
    *("mtpdecode compiled K=1", "mtpdecode compiled K=3", "mtpdecode compiled auto", "mtpdecode compiled random head auto"),
)
"""The contenders of the small table, where they were measured."""


def grid(cells: list[dict[str, Any]]) -> str:
    """A line a cell: how many times as fast as the best plain way there, and tau behind it."""
    found = [{c["contender"]: c for c in cell["contenders"]} for cell in cells]
    names = [name for name in IN_GRID if any(name in each for each in found)]
    rows = [
        (*where(cell), *(beside_best(each[name]) if name in each else "" for name in names))
        for cell, each in zip(cells, found, strict=True)
    ]
    title = "Other cells: times the best plain way of the cell, quartiles, and tau in round brackets"
    return f"{title}:\n\n" + table(["dtype", "batch", "temperature", "context", "best plain", *names], rows) + "\n"


def where(cell: dict[str, Any]) -> tuple[object, ...]:
    return cell["dtype"], cell["batch_size"], f"{cell['temperature']:g}", cell["context"] or "short", cell["best_plain"]


def beside_best(contender: dict[str, Any]) -> str:
    ratio, tau = spread(contender["ratio_to_best_plain"]), contender["tau"]
    return ratio if tau is None else f"{ratio} ({tau:.2f})"


def acceptance(result: dict[str, Any]) -> str:
    """Tau and acceptance by draft position, by kind of prompt, with prompt lookup beside it."""
    depth, tokens = result["settings"]["num_speculative_tokens"], result["settings"]["max_new_tokens"]
    lines = [
        (k["kind"], k["temperature"], k["num_prompts"], k["tau"], *k["acceptance"], k["prompt_lookup_tau"])
        for k in result["kinds"]
    ]
    header = ["kind", "temperature", "prompts", "tau", *(f"draft {k}" for k in range(1, depth + 1)), "tau of prompt lookup"]
    title = f"Tau (tokens per target forward) and acceptance by draft position, K = {depth}, held-out prompts"
    return f"{title}, {tokens} new tokens, {result['dtype']}:\n\n" + table(header, lines)


def in_short(decode: dict[str, Any]) -> str:
    """The first table alone: single prompts in bfloat16."""
    return "".join(contenders(cell) for cell in decode["cells"] if is_single(cell) and cell["dtype"] == "bfloat16")


ELSEWHERE = (
    "float32, batches, sampled text and long prompts, the cells that we lose among them: [what was measured](docs/measured.md). "
    "The scripts and every single measurement: [benchmarks](benchmarks/README.md)."
)
MADE_BY = (
    "`python -m benchmarks.report` writes this page from `benchmarks/results`. How it is measured: "
    "[benchmarks](../benchmarks/README.md). What was expected of each change, and what came: [notes](../benchmarks/NOTES.md)."
)


def main() -> None:
    decode, accepted = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("decode", "acceptance"))
    what = "SmolLM2-135M-Instruct with the head that ships here; brackets hold quartiles."
    section = f"{what} {ELSEWHERE}\n\n" + in_short(decode) + acceptance(accepted)
    page = README.read_text()
    README.write_text(page.split(BEGIN)[0] + BEGIN + section + END + page.split(END)[1])
    PAGE.write_text(f"# What was measured\n\n{what} {MADE_BY}\n\n" + wall_clock(decode) + acceptance(accepted))
    print(section)


if __name__ == "__main__":
    main()
