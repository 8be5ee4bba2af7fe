"""vLLM as a contender, in a process of its own and so not interleaved. Written from its documentation; it was never run here.

decode.py  --(a job, JSON, a file)-->  python -m benchmarks.beside_vllm JOB  --(last line of its output, JSON)-->  decode.py
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = ("vllm", "vllm mtp")
WARM_UP_TOKENS = 8


def is_installed() -> bool:
    """Says so where it is not."""
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed: it takes no part")
        return False
    return True


def job(
    folder: Path, dtype: str, batches: Sequence[Sequence[list[int]]], temperature: float, max_new_tokens: int, repeats: int
) -> dict[str, Any]:
    """What both processes agree on. batches: rows of ids."""
    return {
        "engine": {"model": str(folder), "dtype": dtype, "enable_prefix_caching": False},
        "sampling": {"temperature": temperature, "max_tokens": max_new_tokens},
        "batches": batches,
        "repeats": repeats,
    }


def measured(name: str, asked: dict[str, Any], num_speculative_tokens: int) -> list[dict[str, Any]]:
    """-> per repeat and batch: batch, repeat, seconds, tokens (a list of ids a row). Raises RuntimeError with its last words."""
    if name.endswith("mtp"):
        drafting = {"method": "mtp", "num_speculative_tokens": num_speculative_tokens}
        asked = asked | {"engine": asked["engine"] | {"speculative_config": drafting}}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asked, file)
        file.flush()
        ended = subprocess.run([sys.executable, "-m", __name__, file.name], capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError((ended.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return json.loads(ended.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    """The other process."""
    import vllm

    asked = json.loads(Path(sys.argv[1]).read_text())
    engine = vllm.LLM(**asked["engine"])
    batches = [[{"prompt_token_ids": ids} for ids in rows] for rows in asked["batches"]]
    settings = vllm.SamplingParams(**asked["sampling"])
    for rows in batches:
        engine.generate(rows, vllm.SamplingParams(**asked["sampling"] | {"max_tokens": WARM_UP_TOKENS}), use_tqdm=False)
    found = []
    for repeat in range(asked["repeats"]):
        for at, rows in enumerate(batches):
            start = time.perf_counter()
            outputs = engine.generate(rows, settings, use_tqdm=False)
            seconds = time.perf_counter() - start
            tokens = [list(output.outputs[0].token_ids) for output in outputs]
            found.append({"batch": at, "repeat": repeat, "seconds": seconds, "tokens": tokens})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
