"""Checkpoints whose head was dropped, quantised or is no native one: each error says which, and how to take the head elsewhere.

Quantising and fine-tuning tools write the base's tensors back and forget the others. One family stands for each layout here; that
the head of the original goes with the bare target is shown for all families in `test_zoo.py`.
"""

import json

import pytest
import torch

from mtpdecode import HeadWeightsError, MTPDecoder, UnsupportedModelError
from mtpdecode.families import FAMILIES
from tests import tiny
from tests.families.test_zoo import built, write_case
from tests.families.zoo import cases

ROWS = {row.family: row for row in FAMILIES}
LAYOUTS = {
    "deepseek_v3": "model.layers.2.",
    "glm_ocr": "model.language_model.layers.2.",
    "exaone_moe": "mtp.",
    "exaone4_5": "mtp.",
    "mimo": "model.mtp_layers.0.",
    "mimo_v2_flash": "model.mtp.layers.0.",
    "longcat_flash": "model.mtp.",
    "ernie4_5_moe": "model.mtp_",
}
"""Family -> where its first layer lies."""
LAYOUT = pytest.mark.parametrize("family", LAYOUTS)


def case_of(family):
    return next(case for case in cases() if case.family == family)


def refusal(error, folder, **kwargs):
    with pytest.raises(error) as caught:
        MTPDecoder.from_pretrained(folder, **kwargs)
    return str(caught.value)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@LAYOUT
def test_a_dropped_head(family, tmp_path):
    """What was asked for, where it was looked for, what to type; and what it says to type works, from_model too."""
    case = case_of(family)
    bare = write_case(tmp_path / "tuned", case, lambda tensors: {})
    said = refusal(HeadWeightsError, bare)
    assert f"The {family} head of {str(bare)!r}" in said
    assert f"hold none of its tensors ({LAYOUTS[family]}*" in said
    assert "MTPDecoder.from_model(model, head='ORIGINAL/REPOSITORY')" in said
    original = write_case(tmp_path / "original", case)
    decoder = MTPDecoder.from_model(MTPDecoder.from_pretrained(original).target, head=original)
    for name, tensor in built(case)[1].state_dict().items():
        assert torch.equal(decoder.head.state_dict()[name], tensor), name


@LAYOUT
@pytest.mark.parametrize(
    "kind", ["weight_scale_inv", "weight_scale", "weight_packed", "scale", "qweight", "scales", "weight.absmax"]
)
def test_a_quantised_head(family, kind, tmp_path):
    """One matrix of the block lies there as FP8, FP4, GPTQ, AWQ or bitsandbytes write it."""
    names = []

    def quantised(tensors):
        names.append(next(name for name in tensors if name.endswith("_proj.weight") and "mlp" in name))
        return tensors | {names[0].removesuffix("weight") + kind: torch.ones(2)}

    said = refusal(HeadWeightsError, write_case(tmp_path / "quantised", case_of(family), quantised))
    assert f"it is quantised ({names[0].removesuffix('weight')}{kind} and 0 more)" in said
    assert "from_model(model, head='ORIGINAL/REPOSITORY')" in said


@LAYOUT
def test_a_head_of_which_a_part_was_dropped(family, tmp_path):
    """Every missing tensor is named: nothing is filled with noise."""
    dropped = []

    def without_mlps(tensors):
        dropped.extend(name for name in tensors if "mlp" in name)
        return {name: tensor for name, tensor in tensors.items() if "mlp" not in name}

    said = refusal(HeadWeightsError, write_case(tmp_path / "partial", case_of(family), without_mlps))
    assert f"missing: {sorted(dropped)[0]}" in said
    assert len(dropped) <= 6 or f"and {len(dropped) - 6} more" in said


@pytest.mark.parametrize("family", [family for family in LAYOUTS if ROWS[family].num_layers_keys])
def test_a_config_that_counts_no_layers(family, tmp_path):
    """As of models that are published without their head (Kimi-K3 has a count of 0)."""
    folder = write_case(tmp_path / "bare", case_of(family), lambda tensors: {})
    raw = json.loads((folder / "config.json").read_text())
    zeros = dict.fromkeys(ROWS[family].num_layers_keys, 0)
    text = {"text_config": raw["text_config"] | zeros} if "text_config" in raw else {}
    said = refusal(UnsupportedModelError, edit_config(folder, **zeros, **text))
    assert "has no native MTP head" in said
    assert ROWS[family].num_layers_keys[0] in said
    assert "head='FOLDER/OR/REPOSITORY'" in said


DRAFTERS = {
    "EAGLE": {"architectures": ["LlamaForCausalLMEagle3"]},
    "eagle in vLLM's speculators": {"speculators_model_type": "eagle3"},
    "DFlash": {"architectures": ["DFlashDraftModel"]},
    "DSpark": {"dspark_block_size": 5, "dspark_markov_rank": 8},
    "Medusa": {"model_type": "medusa"},
}


@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_drafter_of_another_kind(kind, tmp_path):
    """Drafters that are trained apart, and DeepSeek-V4.1's stages under `mtp.*`: engines know them, native heads they are not."""
    model, folder = tiny.target("llama"), tiny.write_checkpoint(tmp_path / "drafter", tiny.target("llama"), tiny.head("llama"))
    with pytest.raises(UnsupportedModelError) as caught:
        MTPDecoder.from_model(model, head=edit_config(folder, **DRAFTERS[kind]))
    said = str(caught.value)
    assert str(folder) in said
    assert f"it holds a {kind.split()[0]} drafter".lower() in said.lower()
    assert "native MTP heads only" in said
    assert "NGramProposer()" in said
