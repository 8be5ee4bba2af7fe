"""Where each millisecond of a round goes: greedy decoding of one prompt at a time, the round's calls timed from outside.

    python -m benchmarks.round

A timer stands around each public function that a round calls, and a timer inside another one is taken out of the outer one,
so the parts add up to the whole. The timers themselves cost about a microsecond each.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any
from unittest.mock import patch

import torch

import mtpdecode
from benchmarks import common
from mtpdecode import loop
from mtpdecode.sampling import Sampler
from mtpdecode.stopping import Stopping

PARTS = (
    "target forward",
    "head: absorb and first draft",
    "head: further drafts",
    "head: vocabulary product",
    "processors",
    "acceptance",
    "stopping",
    "caches",
    "state and bookkeeping",
    "host: read tokens, metrics",
)
WARM_UP_TOKENS = 8


class Stopwatch:
    """Exclusive seconds by part: what runs inside another timed call counts for the inner part only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def around(self, name: Callable[..., str], function: Callable[..., Any], outermost: bool = False) -> Callable[..., Any]:
        """`function`, timed; unless it is the outermost part, only while another part runs: the prompt's work is left out."""

        @wraps(function)  # transformers looks at the signature of `forward`
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not (outermost or self._open):
                return function(*args, **kwargs)
            self._switch()
            self._open.append(name(*args, **kwargs))
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()

        return timed


def _head_part(depth: int, embeds: torch.Tensor, *_: Any) -> str:
    return "head: absorb and first draft" if embeds.shape[1] > 1 else "head: further drafts"


@contextmanager
def watching(decoder: mtpdecode.MTPDecoder) -> Iterator[Stopwatch]:
    """Times what a round calls, as long as the context lasts; nothing stays patched."""
    watch = Stopwatch()
    named = [
        (decoder.target, "forward", "target forward"),
        (decoder.head, "logits", "head: vocabulary product"),
        (Sampler, "scores", "processors"),
        (loop, "judge", "acceptance"),
        (Stopping, "truncate", "stopping"),
        (mtpdecode.RaggedCache, "window", "caches"),
        (mtpdecode.RaggedCache, "commit", "caches"),
        (mtpdecode.RaggedCache, "reserve", "caches"),
    ]
    with ExitStack() as stack:

        def time_it(owner: Any, attribute: str, name: Callable[..., str], outermost: bool = False) -> None:
            timed = watch.around(name, getattr(owner, attribute), outermost)
            stack.enter_context(patch.object(owner, attribute, timed))

        for owner, attribute, part in named:
            time_it(owner, attribute, lambda *_, part=part, **__: part)
        time_it(decoder.head, "forward", _head_part)
        time_it(loop, "decode_round", lambda *_, **__: "state and bookkeeping", outermost=True)
        yield watch


def measure(
    decoder: mtpdecode.MTPDecoder, chosen: list[common.Prompt], args: argparse.Namespace, num_drafted: int
) -> dict[str, Any]:
    """All prompts at one K. -> milliseconds a round by part, and what a round gives."""
    generate = partial(decoder.generate, num_speculative_tokens=num_drafted, do_sample=False)
    common.timed(decoder.target, generate, chosen[0], max_new_tokens=WARM_UP_TOKENS)
    calls: list[Any] = []
    with watching(decoder) as watch:
        for prompt in chosen:
            common.timed(decoder.target, generate, prompt, max_new_tokens=args.max_new_tokens)
            calls.append(decoder.metrics)
    whole = mtpdecode.Metrics.pooled(calls)
    watch.seconds["host: read tokens, metrics"] = whole.seconds["host"]
    prefill = whole.seconds["prefill"] / len(calls)
    parts = {part: 1000 * watch.seconds[part] / whole.num_rounds for part in PARTS}
    return {"K": num_drafted, "tau": whole.tau, "num_rounds": whole.num_rounds, "ms": parts, "prefill_ms": 1000 * prefill}


def measure_plain(decoder: mtpdecode.MTPDecoder, chosen: list[common.Prompt], args: argparse.Namespace) -> float:
    """Milliseconds a token of `model.generate`, the prompt's forward included."""
    target: Any = decoder.target
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    runs = [common.timed(target, target.generate, prompt, **options) for prompt in chosen]
    return 1000 * sum(run.seconds for run in runs) / sum(len(run.tokens) for run in runs)


def main() -> None:
    parser = common.parser(__doc__, num_per_kind=2)
    parser.add_argument("--num-speculative-tokens", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="K")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    common.start(args)
    decoder, tokenizer = mtpdecode.load(common.MODEL, dtype=args.dtype)
    chosen = common.prompts(tokenizer, args.num_per_kind)
    plain = measure_plain(decoder, chosen, args)
    columns = [measure(decoder, chosen, args, k) for k in args.num_speculative_tokens]
    result = common.card(args) | {"plain_ms_per_token": plain, "rounds": columns}
    common.show_card(result)
    print(f"milliseconds of a round, {args.dtype}; a token of model.generate takes {plain:.1f} ms")
    table = [[part, *(column["ms"][part] for column in columns)] for part in PARTS]
    totals = [sum(column["ms"].values()) for column in columns]
    table += [["a round", *totals], ["tokens a round (tau)", *(column["tau"] for column in columns)]]
    table += [["a token", *(total / column["tau"] for total, column in zip(totals, columns, strict=True))]]
    common.show_table(["", *(f"K={column['K']}" for column in columns)], table)
    common.write(args.out, "round", result)


if __name__ == "__main__":
    main()
