"""The benchmark of speed, run whole on a tiny checkpoint: who takes part, what is compared with what, and what the file keeps."""

import json
import sys
from itertools import islice

import pytest
import torch

from benchmarks import batches, decode, glm_layout, report
from benchmarks.contenders import is_chosen
from mtpdecode import MTPDecoder
from tests import tiny

SHORT = ("--num-per-kind", "1", "--repeats", "1", "--max-new-tokens", "12", "--threads", "1", "--dtypes", "float32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = tiny.build("llama", max_position_embeddings=512)
    folder = tmp_path_factory.mktemp("checkpoint")
    MTPDecoder.from_model(model, head=tiny.build_head(model, tiny.row_of("llama"))).save_pretrained(folder)
    return folder


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    """Runs the script. -> the cells of its file"""

    def main(*options):
        command = ["decode", "--checkpoint", str(checkpoint), "--out", str(tmp_path), *SHORT, *options]
        monkeypatch.setattr(sys, "argv", command)
        decode.main()
        return json.loads((tmp_path / "decode.json").read_text())["cells"]

    return main


def names(cell):
    return [each["contender"] for each in cell["contenders"]]


def test_a_grid_and_a_cell_measured_again(run, capsys):
    cells = run("--batch-sizes", "1", "3", "--num-speculative-tokens", "0", "2", "--random-head")
    assert [(cell["batch_size"], cell["temperature"]) for cell in cells] == [(1, 0), (3, 0)]
    ours = [f"mtpdecode {what}" for what in ("K=0", "K=2", "auto", "lookup", "lookup auto", "random head auto")]
    single, batch = cells
    assert names(single) == ["generate", "generate use_mtp", "generate prompt lookup", *ours]
    assert names(batch) == ["generate", *ours], "transformers' own speculation takes one row"
    for cell in cells:
        assert not cell["left_out"]
        assert all(each["identical"] == each["texts"] for each in cell["contenders"]), "float32, greedy: the same text"
    by_name = {each["contender"]: each for each in batch["contenders"]}
    assert by_name["mtpdecode K=0"]["tau"] == by_name["generate"]["tau"] == 1
    assert by_name["mtpdecode K=2"]["tau"] > 1.2
    assert len(by_name["mtpdecode K=2"]["accepted"]) == 2
    assert "context as it is" in capsys.readouterr().out

    again = run("--batch-sizes", "3", "--temperatures", "0", "1", "--contexts", "20", "0", "--only", "K=0")
    assert [tuple(cell[name] for name in decode.Cell._fields[1:]) for cell in again] == [
        (1, 0, 0),
        *((3, temperature, context) for context in (0, 20) for temperature in (0, 1)),
    ]
    assert again[0] == single, "what was not measured again stays"
    assert all(names(cell) == ["generate", "mtpdecode K=0"] for cell in again[1:])
    assert again[2]["contenders"][0]["identical"] is None, "sampled texts differ"
    assert [cell["longest_prompt"] for cell in again[1:]] == [8, 8, 20, 20]
    page = report.wall_clock({"cells": again})
    assert "| mtpdecode K=2 |" in page
    assert page.count("\n| float32 | ") == 4, "a line for each cell but the first"


@pytest.mark.slow
def test_compiled_contenders_make_no_graphs_while_timed(run):
    only = ("generate static compiled", "compiled K=*", "compiled lookup")
    cell = run("--compiled", "--backend", "aot_eager", "--num-speculative-tokens", "0", "2", "--only", *only)[0]
    expected = ["generate", "generate static compiled", *(f"mtpdecode compiled {what}" for what in ("K=0", "K=2", "lookup"))]
    assert names(cell) == expected
    assert all(each["identical"] == each["texts"] and not each["graphs"] for each in cell["contenders"])


def test_who_fails_is_left_out_with_the_reason(run, monkeypatch, capsys):
    def broken(*_):
        def generate(**_):
            raise ValueError("no such cache")

        return generate

    monkeypatch.setattr("benchmarks.contenders.static_compiled", broken)
    cell = run("--only", "generate static compiled", "K=1", "--num-speculative-tokens", "1")[0]
    assert names(cell) == ["generate", "mtpdecode K=1"]
    assert cell["left_out"] == {"generate static compiled": "ValueError: no such cache"}
    assert "left out: generate static compiled (ValueError: no such cache)" in capsys.readouterr().out


STAND_IN = """
import json, sys
from collections import namedtuple

Metric = namedtuple("Metric", "name value values")
Output, Tokens = namedtuple("Output", "outputs"), namedtuple("Tokens", "token_ids")

def SamplingParams(**settings):
    return settings

class LLM:
    def __init__(self, model, dtype, speculative_config=None, **settings):
        assert json.load(open(f"{model}/config.json"))["model_type"] == ("glm4_moe" if speculative_config else "llama")
        self.drafts, self.calls = speculative_config, 0

    def generate(self, rows, settings, use_tqdm):
        self.calls += 1
        return [Output([Tokens([5] * settings["max_tokens"])]) for _ in rows]

    def get_metrics(self):
        counts = {"num_drafts": 10 * self.calls, "num_accepted_tokens_per_pos": 4 * self.calls} if self.drafts else {}
        return [Metric(f"vllm:spec_decode_{name}", count, [count]) for name, count in counts.items()]
"""
"""What of vLLM's interface is used."""


def test_vllm_takes_part_in_a_process_of_its_own(run, tmp_path):
    """Its interpreter is another one, which here is ours with a stand-in for vLLM; drafting, it is given another layout."""
    (tmp_path / "vllm.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    cell = run("--vllm", str(python), "--only", "vllm*", "--batch-sizes", "3")[0]
    assert not cell["left_out"]
    assert names(cell) == ["generate", "vllm", "vllm mtp"]
    plain, mtp = cell["contenders"][1:]
    assert (plain["tau"], mtp["tau"]) == (1, pytest.approx(1.4))
    assert cell["rows"][-1]["num_tokens"] == 3 * 12


def test_the_same_weights_in_glms_layout(checkpoint, tmp_path):
    """Logits, and what is drafted and kept."""
    glm_layout.write(checkpoint, tmp_path / "glm")
    llama, glm = (MTPDecoder.from_pretrained(folder, num_speculative_tokens=2) for folder in (checkpoint, tmp_path / "glm"))
    assert type(glm.target).__name__ == "Glm4MoeForCausalLM"
    for decoder in (llama, glm):
        decoder.generate(**tiny.padded(tiny.prompts()), max_new_tokens=30, do_sample=False)
    ids = tiny.one(tiny.prompts()[0])
    assert torch.allclose(glm.target(ids).logits, llama.target(ids).logits, atol=1e-5)
    assert glm.metrics.history == llama.metrics.history
    with pytest.raises(ValueError, match="holds no Llama"):
        glm_layout.write(tmp_path / "glm", tmp_path / "again")


def row(contender, batch, ms_per_token):
    return decode.Row(contender, "chat", batch, 0, 10, 10, ms_per_token, 1.0, True, 1.0, None)


def test_the_best_plain_way_is_that_of_the_cell_and_compared_within_a_batch():
    rows = [row("generate", 0, 4.0), row("generate", 1, 8.0), row("generate", 2, 1.0), row("mtpdecode K=3", 1, 2.0)]
    rows += [row("mtpdecode compiled K=0", at, pace) for at, pace in enumerate([3.0, 4.0, 3.0])]
    assert decode.best_plain(rows) == "mtpdecode compiled K=0"
    found = {
        (each.contender, each.batch): each.ratio_to_best_plain for each in decode.beside_best(rows, "mtpdecode compiled K=0")
    }
    assert found["mtpdecode K=3", 1] == 2
    assert found["generate", 2] == 3


def test_tau_of_a_batch_is_that_of_its_rows():
    plain = decode.Batch([[5] * 8, [5] * 3], 1.0, 8)
    assert decode.tau(plain) == 1
    assert decode.tau(decode.Batch([[5] * 8], 1.0, 4)) == 2


def test_names_are_chosen_by_pattern_with_and_without_our_own_name():
    assert is_chosen("mtpdecode compiled auto", ["compiled *"], False, False)
    assert not is_chosen("mtpdecode compiled K=2", ["K=*"], True, True)
    assert is_chosen("mtpdecode K=2", [], False, False)
    assert not is_chosen("generate static compiled", [], False, True)
    assert not is_chosen("mtpdecode random head auto", [], True, False)


def test_prompts_that_come_again_are_cut():
    every = list(islice(batches.texts(), 144))
    assert len(set(every)) == 144
    assert all(again[1] == first[1].rsplit(" ", 1)[0] for first, again in zip(every[:72], every[72:], strict=True))


class Letters:
    """A tokenizer of single characters, whose template adds nothing."""

    def __call__(self, text, **_):
        return {"input_ids": list(map(ord, text))}

    def decode(self, ids):
        return "".join(map(chr, ids))

    def apply_chat_template(self, turns, **_):
        return turns[0]["content"]


def test_contexts_are_text_of_ours_before_the_prompt():
    letters, target = Letters(), tiny.build("llama", max_position_embeddings=4000)
    (rows,) = batches.Texts(target, letters).batches(3, 3, context=900, room=64)
    for prompt in rows:
        text = letters.decode(prompt.ids)
        assert text.endswith(prompt.text)
        assert 900 <= len(text) <= 902, "about: a blank line stands before a question"
        assert text[:300] in 2 * batches.filler(prompt.kind)
    (longest,) = batches.Texts(target, letters).batches(1, 1, context=10**6, room=100)
    assert len(longest[0].ids) <= 3902
