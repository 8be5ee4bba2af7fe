"""Where engines disagree, a row has one choice and `spec.replace(...)` the others: each is what an independent twin says."""

from functools import partial

import pytest
import torch

from mtpdecode import MTPDecoder
from mtpdecode.families import FAMILIES
from tests import tiny
from tests.families.layouts import twin_of
from tests.families.test_zoo import built, write_case
from tests.families.zoo import ernie4_5_moe, exaone_moe, glm4_moe_lite, glm_ocr, hy_v3, mimo_v2_flash

ROWS = {row.family: row for row in FAMILIES}

CHOICES = {
    "MiMo-V2's first layer alone, as in vLLM": (
        mimo_v2_flash.CASES[0],
        {"used_layers": 1},
        partial(mimo_v2_flash.drafts, num_layers=1),
    ),
    "MiMo-V2's layers in a chain": (
        mimo_v2_flash.CASES[0],
        {"deeper": "chained"},
        partial(mimo_v2_flash.drafts, deeper="chained"),
    ),
    "K-EXAONE's full attention without positions, as in SGLang": (
        exaone_moe.CASES[1],
        {"block_attributes": ()},
        partial(exaone_moe.drafts, window=None, rope=False),
    ),
    "ERNIE without a norm before the output layer, as in vLLM": (
        ernie4_5_moe.CASES[1],
        {"norm_out": "none"},
        partial(ernie4_5_moe.drafts, norm_out=False),
    ),
    "ERNIE with zeros for the first embedding, as in vLLM and SGLang": (
        ernie4_5_moe.CASES[0],
        {"zero_first_embedding": True},
        partial(ernie4_5_moe.drafts, zero_first=True),
    ),
    "HY-V3 with zeros for the first embedding, as in vLLM and SGLang": (
        hy_v3.CASES[0],
        {"zero_first_embedding": True},
        twin_of(hy_v3.LAYOUT, zero_first=True),
    ),
    "GLM's raw state recycled, as in vLLM": (
        glm4_moe_lite.CASES[0],
        {"recycle": "raw"},
        twin_of(glm4_moe_lite.LAYOUT, recycle="raw"),
    ),
    "GLM-OCR's raw state recycled, as in vLLM": (
        glm_ocr.CASES[0],
        {"recycle": "raw"},
        partial(glm_ocr.drafts, recycle="raw"),
    ),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_is_what_it_says(choice, tmp_path, monkeypatch):
    """The logits of every draft step, and the text is still the target's."""
    case, changes, drafts = CHOICES[choice]
    (model, head), text = built(case), tiny.prompts()[0]
    tensors, steps = {name: tensor.detach() for name, tensor in case.published(head, model).items()}, []
    decoder = MTPDecoder.from_pretrained(write_case(tmp_path / "c", case), spec=ROWS[case.family].replace(**changes))
    expected = tiny.alone(model, text, max_new_tokens=16)
    logits = decoder.head.logits
    monkeypatch.setattr(decoder.head, "logits", lambda *args: steps.append(logits(*args)[0]) or logits(*args))
    said = []
    for chunk in decoder.stream(tiny.one(text), max_new_tokens=16, do_sample=False, num_speculative_tokens=4):
        right, usual = (twin(model, tensors, text + said, 4) for twin in (drafts, case.drafts))
        error = (torch.stack(steps) - right).abs().amax(-1)
        assert float(error.max()) < 1e-4, f"{choice}: the draft steps' logits are off by {error.tolist()}"
        assert float((right - usual).abs().max()) > 1e-3, "the row's own choice gives the same: this tells nothing"
        steps.clear()
        said += chunk.tokens[0]
    assert said == expected
