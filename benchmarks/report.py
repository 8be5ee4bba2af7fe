"""Write the README's measured section from results/decode.json and results/acceptance.json.

python -m benchmarks.report
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

README = Path(__file__).parents[1] / "README.md"
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
    """One table per dtype: milliseconds per token and times plain, median and quartiles."""
    parts = []
    for dtype, figures in result["dtypes"].items():
        contenders, texts = figures["contenders"], figures["contenders"][0]["texts"]
        tokens = result["settings"]["max_new_tokens"]
        parts.append(
            f"Wall clock, batch 1, greedy, {dtype}, {texts} texts of up to {tokens} tokens, interleaved ({machine(result)}):\n\n"
        )
        kinds = list(contenders[0]["ratio_by_kind"])
        rows = [
            (c["contender"], spread(c["ms_per_token"]), spread(c["ratio"]), *c["ratio_by_kind"].values(), c["tokens_per_forward"])
            for c in contenders
        ]
        parts.append(table(["", "ms/token", "times plain", *kinds, "tokens/forward"], rows) + "\n")
    return "".join(parts)


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


def section() -> str:
    decode, accepted = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("decode", "acceptance"))
    return (
        "SmolLM2-135M-Instruct with the head that ships here; brackets hold quartiles. "
        "The scripts and every single measurement are in [benchmarks](benchmarks/README.md).\n\n"
        + wall_clock(decode)
        + acceptance(accepted)
    )


def main() -> None:
    page = README.read_text()
    README.write_text(page.split(BEGIN)[0] + BEGIN + section() + END + page.split(END)[1])
    print(section())


if __name__ == "__main__":
    main()
