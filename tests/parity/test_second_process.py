"""Compiled rounds lie on disk: a second process compiles nothing anew."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys, torch
from mtpdecode import MTPDecoder
from tests import tiny
kept, command = sys.argv[1:]
if command == "load":
    torch.compiler.load_cache_artifacts(open(kept, "rb").read())
decoder = MTPDecoder.from_model(tiny.target("llama"), head=tiny.head("llama"), num_speculative_tokens=2, compiled=True)
text = decoder.generate(**tiny.padded(tiny.prompts(3)), max_new_tokens=12, do_sample=False).tolist()
if command == "save":
    open(kept, "wb").write(torch.compiler.save_cache_artifacts()[0])
counters = torch._dynamo.utils.counters
print(json.dumps([text, counters["inductor"], counters["aot_autograd"]]))
"""


def process(folder, kept, command):
    """A process whose compiler keeps its results in `folder` -> its text, and what it found there."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": paths}
    arguments = [sys.executable, "-c", SCRIPT, str(kept), command]
    done = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    """By the folder of the compiler's cache, and by a file that is carried to a machine without it."""
    kept = tmp_path / "rounds.bin"
    text, first, _ = process(tmp_path / "cache", kept, "save")
    assert first["fxgraph_cache_miss"] == 1
    assert "fxgraph_cache_hit" not in first
    for folder, command in [("cache", "nothing"), ("elsewhere", "load")]:
        again, found, whole = process(tmp_path / folder, kept, command)
        assert again == text
        assert found.get("fxgraph_cache_hit", 0) > 0, f"{command}: {found}"
        assert found.get("fxgraph_cache_miss", 0) == 0, f"{command}: {found}"
        assert whole.get("autograd_cache_hit", 0) > 0, f"{command}: {whole}"
