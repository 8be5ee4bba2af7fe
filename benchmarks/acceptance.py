"""How many draft tokens are accepted, by draft position and prompt kind, with prompt lookup beside it. No timing.

    python -m benchmarks.acceptance

Greedy and at temperature 0.8, in float32. tau counts the target's forwards that append tokens: all but the prompt's own for
mtpdecode, whose first round starts behind the prompt, and all of them for prompt lookup, whose first forward appends already.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mtpdecode
from benchmarks import common
from benchmarks.common import Prompt
from benchmarks.prompts import PROMPTS

TEMPERATURES = (0.0, 0.8)


class Row(NamedTuple):
    """One prompt at one temperature. rounds: how many tokens each round appended."""

    kind: str
    prompt: str
    temperature: float
    num_tokens: int
    tau: float
    rounds: list[int]
    lookup_num_tokens: int
    lookup_tau: float


def sampling(temperature: float) -> dict[str, Any]:
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def measure_mtp(
    decoder: mtpdecode.MTPDecoder, rows: Sequence[Prompt], args: argparse.Namespace, temperature: float
) -> mtpdecode.Metrics:
    """One batch; every row accepts on its own, so the batch changes the time it takes and nothing else."""
    ours = {"num_speculative_tokens": args.num_speculative_tokens, **({"seed": args.seed} if temperature else {})}
    inputs = common.left_padded(rows, common.eos_ids(decoder.target)[0])
    output = decoder.generate(
        **inputs, max_new_tokens=args.max_new_tokens, return_dict_in_generate=True, **sampling(temperature), **ours
    )
    return output.metrics


def measure_lookup(decoder: mtpdecode.MTPDecoder, prompt: Prompt, args: argparse.Namespace, temperature: float) -> common.Run:
    torch.manual_seed(args.seed)
    lookup = {"prompt_lookup_num_tokens": args.num_speculative_tokens, "max_new_tokens": args.max_new_tokens}
    target: Any = decoder.target
    return common.timed(target, target.generate, prompt, **lookup, **sampling(temperature))


def measure_kind(
    decoder: mtpdecode.MTPDecoder, chosen: Sequence[Prompt], args: argparse.Namespace, temperature: float
) -> tuple[list[Row], dict[str, Any]]:
    """-> a row per prompt, and the figures of the kind as a whole."""
    calls, rows = [], []
    for batch in common.batches(chosen, args.batch_size):
        calls.append(measure_mtp(decoder, batch, args, temperature))
        for prompt, rounds in zip(batch, calls[-1].history, strict=True):
            run = measure_lookup(decoder, prompt, args, temperature)
            tau, lookup_tau = sum(rounds) / len(rounds), len(run.tokens) / run.num_forwards
            rows.append(Row(prompt.kind, prompt.text, temperature, sum(rounds), tau, rounds, len(run.tokens), lookup_tau))
    whole = mtpdecode.Metrics.pooled(calls)
    lookup_forwards = sum(row.lookup_num_tokens / row.lookup_tau for row in rows)
    return rows, {
        "kind": chosen[0].kind,
        "temperature": temperature,
        "num_prompts": len(chosen),
        "num_tokens": whole.num_tokens,
        "tau": whole.tau,
        "tau_of_prompts": common.spread([row.tau for row in rows]),
        "acceptance": whole.acceptance_rate(),
        "prompt_lookup_tau": sum(row.lookup_num_tokens for row in rows) / lookup_forwards,
    }


def draw(kinds: Sequence[dict[str, Any]], path: Path) -> None:
    """Acceptance by draft position, one line a kind, full for greedy and dashed for sampled."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for colour, kind in zip(("C0", "C1", "C2"), PROMPTS, strict=True):
        for whole in (whole for whole in kinds if whole["kind"] == kind):
            positions = range(1, len(whole["acceptance"]) + 1)
            manner, style = (f"temperature {whole['temperature']}", "--") if whole["temperature"] else ("greedy", "-")
            axes.plot(positions, whole["acceptance"], style, marker="o", color=colour, label=f"{kind}, {manner}")
    axes.set(xlabel="draft position", ylabel="accepted, given those before it", ylim=(0, 1), xticks=list(positions))
    axes.legend(fontsize="small", ncols=3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = common.parser(__doc__, num_per_kind=24)
    parser.add_argument("--num-speculative-tokens", type=int, default=3, metavar="K", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="rows decoded together by mtpdecode (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    common.start(args)
    decoder, tokenizer = mtpdecode.load(common.MODEL, dtype=torch.float32)
    chosen = common.prompts(tokenizer, args.num_per_kind)
    rows: list[Row] = []
    kinds: list[dict[str, Any]] = []
    for temperature in TEMPERATURES:
        for kind in PROMPTS:
            found, whole = measure_kind(decoder, common.of_kind(chosen, kind), args, temperature)
            rows += found
            kinds.append(whole)
            print(f"{kind} at temperature {temperature}: tau {whole['tau']:.2f}", flush=True)
    result = common.card(args, dtype="float32") | {"kinds": kinds, "rows": [row._asdict() for row in rows]}
    common.show_card(result)
    positions = [f"draft {k}" for k in range(1, args.num_speculative_tokens + 1)]
    table = [[w["kind"], w["temperature"], w["num_prompts"], w["tau"], *w["acceptance"], w["prompt_lookup_tau"]] for w in kinds]
    common.show_table(["kind", "temperature", "prompts", "tau", *positions, "prompt lookup"], table)
    common.write(args.out, "acceptance", result)
    if importlib.util.find_spec("matplotlib"):
        draw(kinds, args.out / "acceptance.png")


if __name__ == "__main__":
    main()
