"""Where engines disagree, a row has one choice and `spec.replace(...)` the others: each is what an independent twin says."""

from functools import partial

import pytest
import torch

from mtpdecode import MTPDecoder
from mtpdecode.families import FAMILIES
from tests import tiny
from tests.families.test_zoo import built, write_case
from tests.families.zoo import exaone4_5, exaone_moe, mimo_v2_flash

ROWS = {row.family: row for row in FAMILIES}
WINDOW, NUM_TOKENS = 32, 200

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


@pytest.mark.parametrize("case", [exaone_moe.CASES[0], exaone4_5.CASES[0], mimo_v2_flash.CASES[0]], ids=lambda case: case.name)
def test_beyond_the_window(case):
    """200 tokens with windows of 32 in target and head: the text is the target's, and drafts are kept as often as before."""
    model = case.build(sliding_window=WINDOW)
    decoder = MTPDecoder.from_model(model, head=tiny.build_head(model, ROWS[case.family], case.num_layers))
    rows = tiny.prompts(3, lengths=(9, 1, 5))
    found = decoder.generate(**tiny.padded(rows), max_new_tokens=NUM_TOKENS, do_sample=False, num_speculative_tokens=3)
    expected = [tiny.alone(model, row, max_new_tokens=NUM_TOKENS) for row in rows]
    tiny.assert_rows(found, 9, expected, case.name)
    assert max(map(len, expected)) > 2 * WINDOW, "the text ends before the window moves"
    for row in decoder.metrics.history:
        late = row[len(row) // 2 :]
        assert sum(late) > 1.2 * len(late), f"{case.name}: {row} tokens a round, hardly any draft is kept late in the text"
