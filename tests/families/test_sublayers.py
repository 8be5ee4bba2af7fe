"""What Nemotron-H, Ling and GLM-5.3-Flash have besides what every family promises: patterns, other models of a name, training."""

import json

import pytest
import torch

from mtpdecode import MTPDecoder, MTPHead, RaggedCache, UnsupportedModelError
from mtpdecode.families import FAMILIES
from mtpdecode.train import mtp_loss
from tests import tiny
from tests.families.test_zoo import write_case
from tests.families.zoo import bailing_hybrid, glm5_next, nemotron_h

ROWS = {row.family: row for row in FAMILIES}
FAMILIES_HERE = pytest.mark.parametrize("family", [nemotron_h, bailing_hybrid, glm5_next], ids=lambda file: file.CASES[0].family)


def first_case(family):
    case = family.CASES[0]
    if case.skip:
        pytest.skip(case.skip)
    return case


@FAMILIES_HERE
def test_the_training_loss_is_that_of_the_twin(family):
    case, ids = first_case(family), torch.randint(3, tiny.VOCAB, (2, 14), generator=torch.Generator().manual_seed(0))
    model = case.build()
    head = tiny.build_head(model, ROWS[case.family])
    tensors = {name: tensor.detach() for name, tensor in case.published(head, model).items()}
    places = [(row, place) for row in range(2) for place in range(2, 14)]
    with torch.no_grad():
        logits = torch.stack([case.drafts(model, tensors, ids[row, :place].tolist(), 1)[0] for row, place in places])
        loss = mtp_loss(head, model, ids, 1)
    wanted = torch.nn.functional.cross_entropy(logits, torch.stack([ids[row, place] for row, place in places]))
    assert abs(float(loss) - float(wanted)) < 1e-5
    mtp_loss(head, model, ids, 2).sum().backward()
    idle = [name for name, weight in head.named_parameters() if weight.grad is None and ".indexer." not in name]
    assert not idle, f"{idle} get no gradient"


@FAMILIES_HERE
def test_in_bfloat16_with_what_is_kept_in_float32(family, tmp_path):
    case = first_case(family)
    decoder = MTPDecoder.from_pretrained(write_case(tmp_path / "half", case), dtype=torch.bfloat16)
    wide = [name for name, tensor in decoder.head.state_dict().items() if tensor.dtype == torch.float32]
    theirs = [name for name, tensor in decoder.target.state_dict().items() if tensor.dtype == torch.float32]
    gates = {name.rpartition(".gate.")[2] for name in theirs if ".gate." in name}
    assert "e_score_correction_bias" in gates  # from transformers 5.24 on, the gate's weight as well
    assert {name.rpartition(".gate.")[2] for name in wide} == gates
    found = decoder.generate(**tiny.padded(tiny.prompts(3)), max_new_tokens=8, do_sample=False, num_speculative_tokens=3)
    assert found.shape[1] == 9 + 8


# ── patterns ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_attention_has_keys():
    """Four sub-layers, two of them attention: so many layers has the head's cache, and the others keep nothing."""
    case = nemotron_h.CASES[-1]
    model = case.build()
    made = []

    def recorded(*args):
        made.append(RaggedCache(*args))
        return made[-1]

    decoder = MTPDecoder.from_model(model, head=tiny.build_head(model, ROWS["nemotron_h"]), cache=recorded)
    decoder.generate(tiny.one(tiny.prompts()[0]), max_new_tokens=4, do_sample=False)
    manager = made[1]
    kinds = model.config.mtp_layers_block_type
    assert kinds == ["full_attention", "moe", "full_attention", "mlp"]
    kept = [layer.keys is not None for layer in manager.window(1).cache.layers if hasattr(layer, "keys")]
    assert kept == [True, True]


@pytest.mark.parametrize(
    ("changes", "num_layers", "says"),
    [
        ({"mtp_layers_block_type": ["linear_attention", "moe"]}, 1, "sub-layers of type linear_attention"),
        ({}, 2, "its config has 2 MTP layers"),
    ],
)
def test_patterns_that_no_head_was_seen_to_have_are_refused(changes, num_layers, says):
    with pytest.raises(
        UnsupportedModelError, match=f"{says}.*one MTP layer that is made of full_attention, moe, mlp.*NGramProposer"
    ):
        MTPHead(nemotron_h.build(**changes), ROWS["nemotron_h"], num_layers)


@pytest.mark.parametrize("choice", ["first_step", "config"])
def test_pools_of_keys_cannot_be_kept_to(choice):
    model = glm5_next.build(index_share_for_mtp_iteration=True)
    with pytest.raises(
        UnsupportedModelError, match=r"chooses no single keys\. Pass spec=spec\.replace\(index_choice='each_step'\)"
    ):
        MTPHead(model, ROWS["glm5_next"].replace(index_choice=choice))
    MTPHead(model, ROWS["glm5_next"])


def test_another_model_of_the_same_type_is_refused_by_name(tmp_path):
    """Ling 2.5 says bailing_hybrid too; transformers would load it as Ling 3, with random weights where names differ."""
    folder = write_case(tmp_path / "ling", first_case(bailing_hybrid))
    model = MTPDecoder.from_pretrained(folder).target
    settings = json.loads((folder / "config.json").read_text()) | {"architectures": ["BailingMoeV2_5ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(settings))
    for load in (lambda: MTPDecoder.from_pretrained(folder), lambda: MTPDecoder.from_model(model, head=str(folder))):
        with pytest.raises(
            UnsupportedModelError, match=r"a BailingMoeV2_5ForCausalLM, .*decodes inclusionAI/Ling-3\.0-Flash and"
        ):
            load()
