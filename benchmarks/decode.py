"""Wall clock of greedy decoding, one prompt at a time: plain, transformers' own MTP, prompt lookup, and mtpdecode at several K.

    python -m benchmarks.decode

All contenders run the same model in memory. Per prompt and repeat they take turns, each time starting with another one, so
that a slow minute of the machine hits all alike; every ratio is taken within one prompt and repeat. Tokens are counted the
same way for all. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import mtpdecode
from benchmarks import common
from benchmarks.common import Prompt, Run
from benchmarks.prompts import PROMPTS

PLAIN, NATIVE, LOOKUP = "generate", "generate use_mtp", "generate prompt lookup"
WARM_UP_TOKENS = 8


class Contender(NamedTuple):
    """A way of decoding. generate: takes what `model.generate` takes. decoder: ours, if it is one of ours."""

    name: str
    generate: Callable[..., Any]
    decoder: mtpdecode.MTPDecoder | None = None


class Row(NamedTuple):
    """One measurement. ratio: how many times the speed of plain decoding of the same prompt in the same repeat."""

    contender: str
    kind: str
    prompt: str
    repeat: int
    num_tokens: int
    num_forwards: int
    ms_per_token: float
    ratio: float
    identical: bool


def load(dtype: torch.dtype, folder: Path) -> tuple[mtpdecode.MTPDecoder, Any]:
    """The preset, its target read back from one checkpoint with the head in it, as `use_mtp` needs it."""
    decoder, tokenizer = mtpdecode.load(common.MODEL, dtype=dtype)
    decoder.save_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    prepare_for_use_mtp(target)
    return mtpdecode.MTPDecoder.from_model(target, head=folder), tokenizer


def prepare_for_use_mtp(target: PreTrainedModel) -> None:
    """transformers finds MTP weights by names that it lists per model class; Llama has none, so this instance gets its own."""
    first = target.config.num_hidden_layers
    target._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{first}\..*"]


def contenders(decoder: mtpdecode.MTPDecoder, drafted: Sequence[int], compiled: bool) -> list[Contender]:
    target: Any = decoder.target
    made = partial(mtpdecode.MTPDecoder.from_model, target, head=decoder.head)
    auto, both = made(num_speculative_tokens="auto"), made(lookup=mtpdecode.NGramProposer(4, min_ngram=3))
    ours = [*_fixed("mtpdecode", decoder, drafted), *_own("mtpdecode auto", auto), *_own("mtpdecode lookup", both)]
    if compiled:
        ours += _fixed("mtpdecode compiled", made(compiled=True), drafted)
    return [
        Contender(PLAIN, target.generate),
        Contender(NATIVE, partial(target.generate, use_mtp=True)),
        Contender(LOOKUP, partial(target.generate, prompt_lookup_num_tokens=3)),
        *ours,
    ]


def _own(name: str, decoder: mtpdecode.MTPDecoder, **options: Any) -> list[Contender]:
    return [Contender(name, partial(decoder.generate, **options), decoder)]


def _fixed(name: str, decoder: mtpdecode.MTPDecoder, drafted: Sequence[int]) -> list[Contender]:
    return [each for k in drafted for each in _own(f"{name} K={k}", decoder, num_speculative_tokens=k)]


def rotated(items: Sequence[Contender], turn: int) -> list[Contender]:
    turn %= len(items)
    return [*items[turn:], *items[:turn]]


def measure_prompt(
    decoder: mtpdecode.MTPDecoder, entries: Sequence[Contender], prompt: Prompt, repeat: int, turn: int, num_tokens: int
) -> list[Row]:
    """Every contender once."""
    options = {"max_new_tokens": num_tokens, "do_sample": False}
    runs = {e.name: common.timed(decoder.target, e.generate, prompt, e.decoder, **options) for e in rotated(entries, turn)}
    plain = runs[PLAIN]
    return [_row(e.name, prompt, repeat, runs[e.name], plain) for e in entries]


def _row(name: str, prompt: Prompt, repeat: int, run: Run, plain: Run) -> Row:
    pace, plain_pace = (1000 * r.seconds / len(r.tokens) for r in (run, plain))
    counts = (len(run.tokens), run.num_forwards)
    return Row(name, prompt.kind, prompt.text, repeat, *counts, pace, plain_pace / pace, run.tokens == plain.tokens)


def measure(args: argparse.Namespace, dtype: torch.dtype) -> list[Row]:
    """Every prompt, repeat and contender in one dtype."""
    with tempfile.TemporaryDirectory() as scratch:  # use_mtp reads the head from there in every call
        decoder, tokenizer = load(dtype, Path(scratch) / "checkpoint")
        entries, chosen = (
            contenders(decoder, args.num_speculative_tokens, args.compiled),
            common.prompts(tokenizer, args.num_per_kind),
        )
        measure_prompt(decoder, entries, chosen[0], 0, 0, WARM_UP_TOKENS)
        rows: list[Row] = []
        for repeat in range(args.repeats):
            for at, prompt in enumerate(chosen):
                rows += measure_prompt(decoder, entries, prompt, repeat, repeat + at, args.max_new_tokens)
                print(f"{dtype} repeat {repeat + 1} of {args.repeats}, prompt {at + 1} of {len(chosen)}", flush=True)
    return rows


def summary(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """One contender over all prompts and repeats."""
    return {
        "contender": name,
        "ms_per_token": common.spread([row.ms_per_token for row in rows]),
        "ratio": common.spread([row.ratio for row in rows]),
        "ratio_by_kind": {kind: median(row.ratio for row in common.of_kind(rows, kind)) for kind in PROMPTS},
        "tokens_per_forward": sum(row.num_tokens for row in rows) / sum(_appending(row) for row in rows),
        "identical": sum(row.identical for row in rows),
        "texts": len(rows),
    }


def _appending(row: Row) -> int:
    """Target forwards that append tokens: that of the prompt appends one in transformers, none in mtpdecode."""
    return row.num_forwards - row.contender.startswith("mtpdecode")


def show(dtype: str, summaries: Sequence[dict[str, Any]]) -> None:
    print(f"\n{dtype}: median [quartiles] over prompts and repeats")
    rows = []
    for s in summaries:
        pace, ratio = (common.show_spread(s[name]) for name in ("ms_per_token", "ratio"))
        identical = f"{s['identical']}/{s['texts']}"
        rows.append([s["contender"], pace, ratio, *s["ratio_by_kind"].values(), s["tokens_per_forward"], identical])
    common.show_table(["", "ms/token", "times plain", *summaries[0]["ratio_by_kind"], "tokens/forward", "identical"], rows)


def main() -> None:
    parser = common.parser(__doc__, num_per_kind=4)
    parser.add_argument("--num-speculative-tokens", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="K")
    parser.add_argument("--compiled", action="store_true", help="compiled rounds too: their graphs take minutes to make")
    parser.add_argument("--repeats", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=("bfloat16", "float32"))
    args = parser.parse_args()
    common.start(args)
    results: dict[str, Any] = {}
    headline = {}
    for dtype in args.dtypes:
        rows = measure(args, getattr(torch, dtype))
        by_name = defaultdict(list)
        for row in rows:
            by_name[row.contender].append(row)
        summaries = [summary(name, group) for name, group in by_name.items()]
        results[dtype] = {"contenders": summaries, "rows": [row._asdict() for row in rows]}
        headline[dtype] = {s["contender"]: round(s["ratio"]["median"], 3) for s in summaries}
    result = common.card(args) | {"dtypes": results}
    common.show_card(result)
    for dtype, figures in results.items():
        show(dtype, figures["contenders"])
    common.write(args.out, "decode", result)
    print(json.dumps(headline))


if __name__ == "__main__":
    main()
