"""vLLM as a contender, in a process and, if need be, an environment of its own, and so not interleaved.

decode.py  --(a job, JSON, a file)-->  PYTHON beside_vllm.py JOB  --(last line of its output, JSON)-->  decode.py

The other process imports nothing of this project.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NAMES = ("vllm", "vllm mtp")
WARM_UP_TOKENS = 8
ALONE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""One process, whose threads and output are its own."""


def is_installed(python: str) -> bool:
    """Says so where it is not."""
    found = subprocess.run([python, "-c", "import importlib.util as u; raise SystemExit(u.find_spec('vllm') is None)"])
    if found.returncode:
        print(f"vLLM is not installed for {python}: it takes no part")
    return not found.returncode


def job(folder: Path, batches: Sequence[Sequence[list[int]]], ends: Sequence[int], **asked: Any) -> dict[str, Any]:
    """What both processes agree on. batches: rows of ids. ends: end tokens. asked: see `decode.py`."""
    longest = max(len(ids) for rows in batches for ids in rows) + asked["max_new_tokens"] + 64
    engine = {"model": str(folder), "dtype": asked["dtype"], "max_model_len": longest, "max_num_seqs": max(map(len, batches))}
    engine |= {"enable_prefix_caching": False, "skip_tokenizer_init": True, "disable_log_stats": False}
    sampling = {"temperature": asked["temperature"], "max_tokens": asked["max_new_tokens"]}
    sampling |= {"stop_token_ids": list(ends), "detokenize": False}
    return {"engine": engine, "sampling": sampling, "batches": batches} | {name: asked[name] for name in ("repeats", "threads")}


def measured(name: str, asked: dict[str, Any], num_speculative_tokens: int, python: str) -> dict[str, Any]:
    """-> runs: per repeat and batch its seconds and tokens (a list of ids a row); kept: how often draft token k was kept, of all.

    Raises RuntimeError with its last words.
    """
    if name.endswith("mtp"):
        drafting = {"method": "mtp", "num_speculative_tokens": num_speculative_tokens}
        asked = asked | {"engine": asked["engine"] | {"speculative_config": drafting}}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asked, file)
        file.flush()
        surroundings = os.environ | ALONE | {"OMP_NUM_THREADS": str(asked["threads"])}
        command = [python, str(Path(__file__).resolve()), file.name]
        ended = subprocess.run(command, capture_output=True, text=True, env=surroundings, cwd=tempfile.gettempdir())
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(([line for line in lines if "Error: " in line] or lines)[-1])  # behind its error it says more
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
    before, found = list(_counted(engine)), []
    for repeat in range(asked["repeats"]):
        for at, rows in enumerate(batches):
            start = time.perf_counter()
            outputs = engine.generate(rows, settings, use_tqdm=False)
            seconds = time.perf_counter() - start
            tokens = [list(output.outputs[0].token_ids) for output in outputs]
            found.append({"batch": at, "repeat": repeat, "seconds": seconds, "tokens": tokens})
    counted = [now - then for now, then in zip(_counted(engine), before, strict=True)]
    drafts, *kept = counted or [0]
    print(json.dumps({"runs": found, "kept": [each / drafts for each in kept] if drafts else []}))


def _counted(engine: Any) -> Iterator[float]:
    """Drafts, and how many of them kept token 1, 2, ...; nothing where none is drafted."""
    told = {metric.name: metric for metric in engine.get_metrics()}
    if "vllm:spec_decode_num_drafts" in told:
        yield told["vllm:spec_decode_num_drafts"].value
        yield from told["vllm:spec_decode_num_accepted_tokens_per_pos"].values


if __name__ == "__main__":
    main()
