"""Checkpoints that are damaged, incomplete or not what their config says: each is named, and nothing is left half-done."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtpdecode import CheckpointError, HeadWeightsError, MTPDecoder, UnsupportedModelError, checkpoint, loading, save_head
from mtpdecode.checkpoint import Checkpoint, read_head
from tests import tiny

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A sound GLM checkpoint of two layers and one MTP layer (`model.layers.2.`) in one file, for a test to damage."""
    return tiny.write_checkpoint(tmp_path / "glm", tiny.target("glm4_moe"), tiny.head("glm4_moe"))


@pytest.fixture
def sharded(tmp_path):
    return tiny.write_checkpoint(tmp_path / "glm", tiny.target("glm4_moe"), tiny.head("glm4_moe"), num_shards=3)


def change(folder, **tensors):
    """Rewrite the one file with some tensors replaced; None takes one out."""
    whole = load_file(folder / ONE) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in whole.items() if tensor is not None}, folder / ONE)


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refused(folder, error, *parts, model=None):
    """Reading the head fails with an error that says all parts, and the target is not touched."""
    model = model or tiny.target("glm4_moe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error) as caught:
        MTPDecoder.from_model(model, head=folder)
    message = str(caught.value)
    for part in parts:
        assert part in message, f"{part!r} is not said: {message}"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return message


# ── tensors that do not fit ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lacking_tensor(folder):
    change(folder, model__layers__2__eh_proj__weight=None)
    refused(folder, HeadWeightsError, str(folder), "missing: model.layers.2.eh_proj.weight", "Download the checkpoint again")


def test_a_lacking_expert(folder):
    change(folder, **{"model.layers.2.mlp.experts.3.up_proj.weight": None})
    refused(folder, HeadWeightsError, "missing: model.layers.2.mlp.experts.3.up_proj.weight", "spec=MTPSpec(...)")


def test_a_surplus_tensor(folder):
    change(folder, model__layers__2__self_attn__q_norm__weight=torch.ones(8))
    refused(folder, HeadWeightsError, "surplus: model.layers.2.self_attn.q_norm.weight", "Download the checkpoint again")


def test_copies_of_the_targets_own_tensors_are_no_surplus(folder):
    change(folder, **{"model.layers.2.embed_tokens.weight": None, "model.layers.2.shared_head.head.weight": None})
    assert MTPDecoder.from_model(tiny.target("glm4_moe"), head=folder).head.num_layers == 1, "and none is needed"


def test_a_wrong_shape(folder):
    change(folder, model__layers__2__eh_proj__weight=torch.zeros(32, 32))
    refused(folder, HeadWeightsError, "misshapen: model.layers.2.eh_proj.weight is (32, 32), not (32, 64)", "Download")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number(folder, value):
    broken = torch.ones(32)
    broken[7] = value
    change(folder, model__layers__2__enorm__weight=broken)
    refused(folder, HeadWeightsError, "with NaN or infinite values: model.layers.2.enorm.weight", "Download")


def test_everything_that_is_wrong_is_said_at_once(folder):
    change(folder, model__layers__2__eh_proj__weight=None, model__layers__2__more__weight=torch.ones(1))
    message = refused(folder, HeadWeightsError, "missing: model.layers.2.eh_proj.weight", "surplus: model.layers.2.more.weight")
    assert "more" not in message.split("surplus")[0], "each name under its own heading"


def test_long_lists_are_cut(folder):
    names = [name for name in load_file(folder / ONE) if ".2.mlp.experts." in name]
    change(folder, **dict.fromkeys(names))
    message = refused(folder, HeadWeightsError, "and 6 more")
    assert len(message) < 1000, "a message is read by a person"


def test_a_quantised_head(folder):
    change(folder, model__layers__2__eh_proj__weight_scale_inv=torch.ones(1, 1))
    refused(folder, HeadWeightsError, "it is quantised (model.layers.2.eh_proj.weight_scale_inv", "head='ORIGINAL/REPOSITORY'")


# ── configs and files that disagree ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_config_that_promises_a_head_that_the_files_lack(folder):
    change(folder, **{name: None for name in load_file(folder / ONE) if name.startswith("model.layers.2.")})
    refused(folder, HeadWeightsError, "the files hold none of its tensors", "model.layers.2.*", "original checkpoint")


def test_a_config_that_promises_more_layers_than_the_files_hold(folder):
    configure(folder, num_nextn_predict_layers=2)
    refused(folder, HeadWeightsError, "missing: model.layers.3.", "Download the checkpoint again")


def test_files_that_hold_more_layers_than_the_config_promises(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "glm", tiny.target("glm4_moe"), tiny.head("glm4_moe", 2))
    configure(folder, num_nextn_predict_layers=1)
    refused(folder, HeadWeightsError, "surplus: model.layers.3.", "Download the checkpoint again")


NO_HEAD = ("num_nextn_predict_layers", "Known families: ", "glm4_moe", "head='FOLDER/OR/REPOSITORY'", "NGramProposer()")


def test_a_config_that_says_no_head(folder):
    configure(folder, num_nextn_predict_layers=0)
    refused(folder, UnsupportedModelError, *NO_HEAD)


def test_neither_config_nor_tensors_speak_of_a_head(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "bare", tiny.target("glm4_moe"))
    configure(folder, num_nextn_predict_layers=None, num_mtp_layers=None)
    refused(folder, UnsupportedModelError, *NO_HEAD)


def test_a_config_that_is_silent_about_a_head_that_is_there(folder):
    """As MiMo-V2 has it: then the tensors are counted."""
    configure(folder, num_nextn_predict_layers=None)
    assert MTPDecoder.from_model(tiny.target("glm4_moe"), head=folder).head.num_layers == 1


def test_a_head_of_another_size(tmp_path):
    folder = tmp_path / "head"
    save_head(tiny.head("llama"), folder)
    refused(folder, HeadWeightsError, "misshapen", "is (32,), not (64,)", model=tiny.build("llama", hidden_size=64))


@pytest.mark.parametrize("ids", [[], [3, 48], [-1, 4], [4, 4], [[3, 4]]])
def test_a_draft_vocabulary_that_is_none(ids, folder):
    change(folder, draft_vocabulary=torch.tensor(ids, dtype=torch.int32))
    refused(folder, HeadWeightsError, "its draft_vocabulary", "different token ids in 0..47", "made for this model")


def test_a_head_of_another_family(tmp_path):
    save_head(tiny.head("mimo"), tmp_path / "head")
    refused(tmp_path / "head", HeadWeightsError, "the files hold none of its tensors", "model.layers.2.*")


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("left", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file(folder, left):
    size = (folder / ONE).stat().st_size
    os.truncate(folder / ONE, left if isinstance(left, int) else int(size * left))
    refused(folder, CheckpointError, ONE, "truncated or damaged", "Download or write it again")


def test_a_file_that_is_something_else(folder):
    (folder / ONE).write_bytes(b"<html>404</html>" * 100)
    refused(folder, CheckpointError, ONE, "truncated or damaged", "Download or write it again")


def test_no_file_at_all(folder):
    (folder / ONE).unlink()
    refused(folder, CheckpointError, ONE, "it is absent", "config.json and all of its safetensors files")


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, CheckpointError, "config.json", "it is absent", "Give a folder or repository")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "7", '{"a": }', "\x00"])
def test_a_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, CheckpointError, "config.json", "was to be read as JSON", "Download or write it again")


def test_a_config_that_is_no_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00\x01")
    refused(folder, CheckpointError, "was to be read as JSON", "Download or write it again")


def test_an_index_that_names_an_absent_file(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, CheckpointError, "model-00002-of-00003.safetensors", "it is absent", "all of its safetensors files")


def test_an_index_that_names_a_truncated_file(sharded):
    os.truncate(sharded / "model-00002-of-00003.safetensors", 50)
    refused(sharded, CheckpointError, "model-00002-of-00003.safetensors", "truncated or damaged")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": 3}', "[]", "{"])
def test_an_index_that_says_nothing(sharded, index):
    (sharded / INDEX).write_text(index)
    refused(sharded, CheckpointError, INDEX, "ownload")


def test_a_place_that_does_not_exist(tmp_path):
    refused(tmp_path / "nowhere", CheckpointError, "nowhere", "no local folder", "Give a folder with config.json")
    with pytest.raises(CheckpointError, match="nobody/no-such-model"):
        MTPDecoder.from_pretrained("nobody/no-such-model")


def test_the_base_is_not_even_loaded_from_a_damaged_checkpoint(folder):
    os.truncate(folder / ONE, 100)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        MTPDecoder.from_pretrained(folder)


# ── reading and writing ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_opening_reads_no_tensor_and_reading_opens_each_file_once(sharded, monkeypatch):
    opened = []
    safe_open = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", lambda path, **kwargs: opened.append(path.name) or safe_open(path, **kwargs))
    files = Checkpoint(sharded)
    assert len(opened) == 3, "names are read once a file"
    opened.clear()
    head = tiny.head("glm4_moe")
    tensors = read_head(files, head.spec, 2, head.state_dict())
    assert sorted(opened) == sorted(set(opened)), f"files were opened more than once: {opened}"
    assert tensors.keys() == head.state_dict().keys()


def test_tensors_are_checked_before_any_is_handed_out(folder):
    """A head is whole or is not there at all."""
    change(folder, model__layers__2__enorm__weight=torch.full((32,), float("nan")))
    head = tiny.build_head(tiny.target("glm4_moe"), tiny.row_of("glm4_moe"))
    with pytest.raises(HeadWeightsError):
        head.load_state_dict(read_head(Checkpoint(folder), head.spec, 2, head.state_dict()))
    assert all(torch.equal(tensor, tiny.head("glm4_moe").state_dict()[name]) for name, tensor in head.state_dict().items())


class Full(OSError):
    """The disk is."""


@pytest.mark.parametrize("step", ["save_head", "_index", "target"])
def test_a_save_that_fails_leaves_the_old_folder_as_it_was(step, tmp_path, monkeypatch):
    decoder = tiny.decoder("llama", 1)
    decoder.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}

    def full(*_, **__):
        raise Full

    other = MTPDecoder.from_model(tiny.target("llama"), head=tiny.head("llama", 2))
    if step == "target":
        monkeypatch.setattr(other.target, "save_pretrained", full)
    else:
        monkeypatch.setattr(loading, step, full)
    with pytest.raises(Full):
        other.save_pretrained(tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"], "and no scratch is left"


def test_a_save_over_an_older_one_replaces_it_and_keeps_the_rest(tmp_path):
    folder = tmp_path / "deep" / "saved"
    tiny.decoder("llama", 1, 2).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    tiny.decoder("llama", 1).save_pretrained(folder)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert MTPDecoder.from_pretrained(folder).head.num_layers == 1, "the older head had two layers"
    assert not list(folder.glob("*.partial"))


def test_saving_over_the_folder_that_it_was_read_from(folder):
    """Its files are still mapped into memory then."""
    decoder = MTPDecoder.from_pretrained(folder)
    decoder.save_pretrained(folder)
    again = MTPDecoder.from_pretrained(folder)
    for name, tensor in tiny.head("glm4_moe").state_dict().items():
        assert torch.equal(again.head.state_dict()[name], tensor), name
    assert decoder.generate(tiny.one([5, 6]), max_new_tokens=3).shape == (1, 5)
