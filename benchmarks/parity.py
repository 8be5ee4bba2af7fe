"""Is the greedy text of mtpdecode that of `model.generate(do_sample=False)`, token for token, on the real model in float32?

    python -m benchmarks.parity

Every K, alone and in left-padded batches, against plain decoding of each prompt alone. Where a token differs, the place is
scored again: its top-2 margin and the size of rounding there say whether it was a tie. Exit status 1 if any was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import mtpdecode
from benchmarks import common
from benchmarks.common import Prompt
from mtpdecode.parity import Divergence, first_divergence


class Difference(NamedTuple):
    """A prompt whose text was not that of plain decoding."""

    prompt: Prompt
    divergence: Divergence

    def report(self) -> dict[str, Any]:
        d = self.divergence
        found = {"position": d.position, "expected": d.expected, "actual": d.actual, "margin": d.margin, "noise": d.noise}
        return {"kind": self.prompt.kind, "prompt": self.prompt.text, **found, "is_tie": d.is_tie}


def decode_plainly(target: Any, chosen: Sequence[Prompt], num_tokens: int) -> list[list[int]]:
    return [common.timed(target, target.generate, p, max_new_tokens=num_tokens, do_sample=False).tokens for p in chosen]


def decode_batch(decoder: mtpdecode.MTPDecoder, batch: Sequence[Prompt], num_tokens: int, num_drafted: int) -> list[list[int]]:
    ends = common.eos_ids(decoder.target)
    inputs = common.left_padded(batch, ends[0])
    rows = decoder.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, num_speculative_tokens=num_drafted)
    return [common.new_tokens(row, inputs["input_ids"].shape[1], ends) for row in rows]


def compare(
    decoder: mtpdecode.MTPDecoder, chosen: Sequence[Prompt], plain: Sequence[list[int]], num_tokens: int, k: int, size: int
) -> list[Difference]:
    """Decode all prompts with K = k in batches of `size`; -> those that differ from `plain`."""
    texts = [tokens for batch in common.batches(chosen, size) for tokens in decode_batch(decoder, batch, num_tokens, k)]
    found = [
        (prompt, first_divergence(decoder.target, prompt.ids, expected, actual))
        for prompt, expected, actual in zip(chosen, plain, texts, strict=True)
    ]
    return [Difference(prompt, divergence) for prompt, divergence in found if divergence is not None]


def main() -> int:
    parser = common.parser(__doc__, num_per_kind=8)
    parser.add_argument("--num-speculative-tokens", type=int, nargs="+", default=[1, 2, 3, 5], metavar="K")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], metavar="B")
    args = parser.parse_args()
    common.start(args)
    decoder, tokenizer = mtpdecode.load(common.MODEL, dtype=torch.float32)
    chosen = common.prompts(tokenizer, args.num_per_kind)
    plain = decode_plainly(decoder.target, chosen, args.max_new_tokens)
    print(f"plain: {len(plain)} texts, {sum(map(len, plain))} tokens", flush=True)
    cells = []
    for size in args.batch_size:
        for k in args.num_speculative_tokens:
            differences = compare(decoder, chosen, plain, args.max_new_tokens, k, size)
            for difference in differences:
                print(f"K={k} B={size} {difference.prompt.kind}: {difference.divergence.describe(str)}")
            cells.append({"K": k, "B": size, "identical": len(chosen) - len(differences), "texts": len(chosen)})
            cells[-1]["differences"] = [difference.report() for difference in differences]
            print(f"K={k} B={size}: {cells[-1]['identical']} of {len(chosen)} identical", flush=True)
    result = common.card(args, dtype="float32") | {"num_tokens": sum(map(len, plain)), "cells": cells}
    common.show_card(result)
    rows = [[f"K={c['K']} B={c['B']}", c["identical"], sum(d["is_tie"] for d in c["differences"]), c["texts"]] for c in cells]
    common.show_table(["", "identical", "ties", "texts"], rows)
    common.write(args.out, "parity", result)
    return int(any(not d["is_tie"] for cell in cells for d in cell["differences"]))


if __name__ == "__main__":
    raise SystemExit(main())
