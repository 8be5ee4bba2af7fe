"""The script for GPUs runs here, small, so that it works the day there is one; and what it says of bytes and time is right."""

import json
import time

import pytest
import torch

from benchmarks import gpu, shapes
from benchmarks.gpu import Budget, Skipped
from mtpdecode.families import FAMILIES
from tests import tiny

SMALL = ["--device", "cpu", "--scale", "tiny", "--prompt", "8", "--new-tokens", "16", "--repeats", "1", "--threads", "1"]
EAGER = ["generate", "ours K=0", "ours K=1", "ours K=3", "generate use_mtp", "ours auto"]
COMPILED = ["ours compiled K=0", "ours compiled K=1", "ours compiled K=3", "ours compiled auto", "generate static"]


def check(result, names):
    """Every model has every cell, with figures or a reason that we know."""
    for model in result["models"]:
        assert "skipped" not in model, model
        cells = {cell["contender"]: cell for cell in model["cells"]}
        assert sorted(cells) == sorted(names)
        for name, cell in cells.items():
            where = f"{model['model']}, {name}: {cell}"
            if "skipped" in cell:
                assert "noise" in cell["skipped"] or (name == "generate use_mtp" and _lacks_mtp(model["model"])), where
                continue
            assert cell["ms_per_round"] > 0, where
            assert cell["recompiles"] == 0, where
            assert (cell["waiting"] is None) == (not name.startswith("ours K")), where
            assert cell["waiting"] is None or cell["waiting"].endswith("rounds, none waited"), where
            if name.endswith("K=0") or name == "generate":
                assert cell["tokens_per_round"] == 1.0, where


def _lacks_mtp(name):
    """Recurrent targets, and those with an assistant."""
    return name in ("qwen3.5-4b", "gemma-4-e2b")


def test_the_whole_script_without_compilation(tmp_path, capsys):
    result = gpu.main([*SMALL, "--eager", "--out", str(tmp_path)])
    check(result, EAGER)
    assert [model["model"] for model in result["models"]] == list(shapes.SHAPES)
    written, printed = json.loads((tmp_path / "gpu.json").read_text()), capsys.readouterr().out
    assert [model["model"] for model in written["models"]] == list(shapes.SHAPES)
    assert "NOT lossless" in written["acceptance"]["rule"]
    assert "SYNTHETIC" in printed
    assert json.loads(printed.splitlines()[-1]).keys() == shapes.SHAPES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", shapes.SHAPES)
def test_compiled_contenders(name, tmp_path):
    result = gpu.main([*SMALL, "--backend", "eager", "--models", name, "--out", str(tmp_path)])
    check(result, EAGER + COMPILED)
    cells = {cell["contender"]: cell for cell in result["models"][0]["cells"]}
    assert cells["ours compiled K=3"]["graphs"] >= 1


def test_without_time_every_cell_says_so(tmp_path):
    result = gpu.main([*SMALL, "--eager", "--minutes", "0", "--out", str(tmp_path)])
    assert all(model["skipped"].startswith("no time") for model in result["models"])


def test_a_cut_run_keeps_what_it_has(tmp_path, monkeypatch):
    def cut(name, *args):
        if name == "qwen3.5-4b":
            raise KeyboardInterrupt
        return {"model": name, "cells": []}

    monkeypatch.setattr(gpu, "run_model", cut)
    with pytest.raises(KeyboardInterrupt):
        gpu.main([*SMALL, "--out", str(tmp_path)])
    assert [model["model"] for model in json.loads((tmp_path / "gpu.json").read_text())["models"]] == ["mimo-7b"]


def test_no_cell_begins_that_would_end_too_late():
    budget = Budget(100.0, graph=30.0)
    with budget.share(4).cell(num_graphs=1):
        pass
    with pytest.raises(Skipped, match="it would take about 120 s"), budget.share(1).cell(num_graphs=4):
        pass
    with budget.cell():
        time.sleep(0.02)
    assert budget.taken["plain"] >= 0.02
    with pytest.raises(Skipped, match="no time: 0 s"), Budget(0.0).cell():
        pass


def test_one_contenders_trouble_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_write_for_use_mtp", lambda *args: 1 / 0)
    cells = gpu.main([*SMALL, "--eager", "--models", "mimo-7b", "--out", str(tmp_path)])["models"][0]["cells"]
    reasons = {cell["contender"]: cell.get("skipped") for cell in cells}
    assert reasons["generate use_mtp"] == "ZeroDivisionError: division by zero"
    assert sum(reason is not None and "noise" not in reason for reason in reasons.values()) == 1


# ── what a round must move ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_bytes_of_a_dense_round_are_those_of_its_matrices():
    """Two layers, 32 wide: counted by hand. float32."""
    built = shapes.build(shapes.MIMO, torch.device("cpu"), torch.float32, "tiny")
    attention = 32 * 32 + 32 + 2 * (32 * 16 + 16) + 32 * 32
    layer = attention + 3 * 32 * 64 + 2 * 32
    target, output = 2 * layer + 32, 64 * 32
    head = layer + 2 * 32 * 32 + 3 * 32
    assert shapes.round_bytes(built, 0, 1, 0, 0) == 4 * (target + output)
    assert shapes.round_bytes(built, 1, 1, 0, 0) == 4 * (target + output + head + output)
    assert shapes.round_bytes(built, 3, 1, 0, 0) == 4 * (target + output + 3 * (head + output))
    assert shapes.round_bytes(built, 0, 2, 10, 7) == 4 * (target + output) + 2 * 10 * 7
    decoder = built.decoder(num_speculative_tokens=0)
    decoder.generate(tiny.one([3, 4, 5]), max_new_tokens=2, do_sample=False)
    assert shapes.slot_bytes(decoder) == 2 * 2 * 16 * 4


def test_experts_are_read_as_often_as_tokens_choose_them():
    built = shapes.build(shapes.GLM, torch.device("cpu"), torch.float32, "tiny")
    experts = sum(p.numel() for name, p in built.target.named_parameters() if ".experts." in name)
    one, many = (shapes.read_bytes(built.target, tokens) for tokens in (1, 10_000))
    assert many - one == pytest.approx(4 * experts * 6 / 8), "one token reads 2 of 8"


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_real_shapes_build_and_fit(name):
    """On "meta", which holds no bytes: the number of weights is that of the name, and all fits 60 GiB."""
    built = shapes.build(shapes.SHAPES[name], torch.device("meta"), torch.bfloat16)
    weights = sum(parameter.numel() for module in (built.target, built.drafter) for parameter in module.parameters())
    billions = {"mimo-7b": (7.4, 8.0), "qwen3.5-4b": (4.0, 4.6), "gemma-4-e2b": (4.4, 5.3), "glm-4.5-air-12-layers": (27, 31)}
    low, high = billions[name]
    assert low < weights / 1e9 < high, f"{weights / 1e9:.2f}"
    assert 2 * weights < 60 * 2**30
    assert {parameter.device.type for parameter in built.drafter.parameters()} == {"meta"}


def test_every_shape_has_a_family():
    assert {shape.family for shape in shapes.SHAPES.values()} <= {row.family for row in FAMILIES}


def test_bandwidth_is_read_and_written():
    assert gpu.bandwidth(torch.device("cpu"), 2**20, num_times=3) > 1e8


def test_a_gpu_is_asked_for_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu --scale tiny"):
        gpu.main([])
