"""Every family keeps the same promises, from a checkpoint in its published layout on."""

import copy
import json
from collections import Counter
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtpdecode import CropCache, HeadWeightsError, MTPDecoder, MTPHead, RaggedCache
from mtpdecode.families import FAMILIES
from mtpdecode.testing import assert_counts, continuation_law, first_tokens
from tests import tiny
from tests.families.zoo import cases

NUM_TOKENS, LENGTHS = 64, (9, 1, 4, 7)
CASES = pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _only_what_is_installed(request):
    if reason := request.node.callspec.params["case"].skip:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """case -> a folder with its checkpoint, written once."""

    @cache
    def write(case):
        return write_case(tmp_path_factory.mktemp("zoo") / case.name, case)

    return write


@pytest.fixture(scope="module")
def loaded(written):
    """case -> a decoder of its checkpoint, loaded once."""
    return cache(lambda case: MTPDecoder.from_pretrained(written(case)))


@pytest.fixture(scope="module")
def plain(loaded):
    """(case, row) -> what `model.generate` makes of the row alone."""
    return cache(lambda case, row: tiny.alone(loaded(case).target, list(row), max_new_tokens=NUM_TOKENS))


@cache
def built(case):
    """(target, head) of a case, in memory."""
    model = case.build()
    row = next(row for row in FAMILIES if row.family == case.family)
    return model, tiny.build_head(model, row, case.num_layers)


def write_case(folder, case, changed=lambda tensors: tensors):
    """A case's checkpoint as the family publishes it. changed: what becomes of the head's tensors."""
    model, head = built(case)
    copy.deepcopy(model).save_pretrained(folder)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in case.published(head, model).items()}
    save_file(load_file(folder / "model.safetensors") | changed(tensors), folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(case.config(json.loads(path.read_text())), indent=2))
    return folder


def prompts():
    return tiny.prompts(len(LENGTHS), lengths=LENGTHS)


@CASES
def test_a_tiny_checkpoint(case, written, loaded):
    assert sum(path.stat().st_size for path in written(case).iterdir()) < 2e6, "2 MB at most"
    head, wanted = loaded(case).head, built(case)[1]
    assert head.spec.family == case.family
    assert head.num_layers == case.num_layers
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(head.state_dict()[name], tensor), f"{name} is not the tensor that was written"


@CASES
@pytest.mark.parametrize("num_speculative_tokens", [1, 2, 4])
def test_greedy_text_is_that_of_generate(case, num_speculative_tokens, loaded, plain):
    decoder, rows, options = loaded(case), prompts(), {"max_new_tokens": NUM_TOKENS, "do_sample": False}
    expected = [plain(case, tuple(row)) for row in rows]
    batch = decoder.generate(**tiny.padded(rows), **options, num_speculative_tokens=num_speculative_tokens)
    tiny.assert_rows(batch, max(LENGTHS), expected, f"{case.name}, ragged batch")
    for manager in (RaggedCache, CropCache)[: 1 + case.crop]:
        alone = MTPDecoder.from_model(decoder.target, head=decoder.head, cache=manager)
        found = alone.generate(tiny.one(rows[0]), **options, num_speculative_tokens=num_speculative_tokens)
        tiny.assert_rows(found, len(rows[0]), expected[:1], f"{case.name} alone on {manager.__name__}")


@CASES
def test_drafts_are_kept_and_refused_at_every_position(case, loaded):
    decoder = loaded(case)
    rows = tiny.prompts(8, seed=1)
    decoder.generate(**tiny.padded(rows), max_new_tokens=NUM_TOKENS // 2, do_sample=False, num_speculative_tokens=3)
    rates = decoder.metrics.acceptance_rate()
    assert all(0.2 <= rate <= 0.9 for rate in rates), f"{decoder.metrics} would test one branch only"
    by_count = decoder.metrics.histogram().sum(0)[1:].tolist()
    assert all(by_count), f"of rounds that append 1, 2, 3 and 4 tokens there were {by_count}; each must occur"


@CASES
def test_logits_of_every_step_are_those_of_an_independent_twin(case, loaded, monkeypatch):
    decoder, (model, head) = loaded(case), built(case)
    tensors = {name: tensor.detach() for name, tensor in case.published(head, model).items()}
    logits, steps, text = decoder.head.logits, [], prompts()[0]
    monkeypatch.setattr(decoder.head, "logits", lambda *args: steps.append(logits(*args)[0]) or logits(*args))
    for number, chunk in enumerate(decoder.stream(tiny.one(text), max_new_tokens=12, do_sample=False, num_speculative_tokens=3)):
        with torch.no_grad():
            wanted = case.drafts(model, tensors, text, len(steps))
        error = (torch.stack(steps) - wanted).abs().amax(-1)
        assert float(error.max()) < 1e-4, f"round {number}: the draft steps' logits are off by {error.tolist()}"
        steps.clear()
        text = text + chunk.tokens[0]
    assert number > 1, "several rounds, so that what was absorbed earlier counts"


@CASES
def test_the_law_of_sampled_text_is_the_targets(case, loaded):
    """One test among all cases with a false-alarm rate of 1e-4 each; rows of two ragged prompts."""
    decoder, (first, _, second, _), options = loaded(case), prompts(), {"temperature": 0.9, "top_k": 3}
    rows, num = [first, second], case.num_rows
    inputs = {name: tensor.repeat(num, 1) for name, tensor in tiny.padded(rows).items()}
    texts = first_tokens(decoder, inputs, 3, max_new_tokens=6, do_sample=True, seed=0, num_speculative_tokens=2, **options)
    for place, row in enumerate(rows):
        law = continuation_law(decoder.target, row, 3, **options)
        assert_counts(Counter(texts[place::2]), law, setting=f"{case.name}, row {place}")


def removed(tensors, name):
    return {each: tensor for each, tensor in tensors.items() if each != name}


def renamed(tensors, name):
    return removed(tensors, name) | {name.replace(".weight", "_x.weight"): tensors[name]}


def reshaped(tensors, name):
    return tensors | {name: torch.cat([tensors[name], tensors[name][:1]])}


@CASES
@pytest.mark.parametrize(("change", "says"), [(removed, "missing: "), (renamed, "surplus: "), (reshaped, "misshapen: ")])
def test_a_wrong_tensor_is_named(case, change, says, tmp_path):
    model, head = built(case)
    weights = sorted(name for name in case.published(head, model) if name.endswith(".weight"))
    copies = ("embed_tokens.weight", "shared_head.head.weight")
    name = [each for each in weights if not each.endswith(copies)][len(weights) // 2]
    with pytest.raises(HeadWeightsError) as caught:
        MTPDecoder.from_pretrained(write_case(tmp_path / "wrong", case, lambda tensors: change(tensors, name)))
    assert name in str(caught.value)
    assert says in str(caught.value)


@CASES
def test_a_dropped_head_is_taken_from_the_original(case, written, loaded, tmp_path):
    bare = write_case(tmp_path / "tuned", case, lambda tensors: {})
    with pytest.raises(HeadWeightsError, match="head='ORIGINAL/REPOSITORY'"):
        MTPDecoder.from_pretrained(bare)
    bare_decoder = MTPDecoder.from_pretrained(bare, head=written(case))
    for decoder in (bare_decoder, MTPDecoder.from_model(bare_decoder.target, head=str(written(case)))):
        for name, tensor in loaded(case).head.state_dict().items():
            assert torch.equal(decoder.head.state_dict()[name], tensor), name


@CASES
def test_what_is_saved_comes_back(case, loaded, tmp_path):
    decoder, row = loaded(case), prompts()[0]
    decoder.save_pretrained(tmp_path / "saved")
    again = MTPDecoder.from_pretrained(tmp_path / "saved")
    assert isinstance(again.head, MTPHead)
    found = again.generate(tiny.one(row), max_new_tokens=8, do_sample=False)
    assert torch.equal(found, decoder.generate(tiny.one(row), max_new_tokens=8, do_sample=False))
