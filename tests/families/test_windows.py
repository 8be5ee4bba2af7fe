"""Sliding windows: rows that start at different places cross the window's edge one after the other, and nothing changes.

Every case of the zoo whose target has a sliding layer is built with a window of 32 and writes 200 tokens.
"""

import copy
from functools import cache, partial

import pytest
import torch

from mtpdecode import CropCache, MTPDecoder
from mtpdecode.families import FAMILIES
from mtpdecode.layers import layer_windows
from tests import tiny
from tests.families.layouts import deepseek_layout, twin_of
from tests.families.zoo import Case, cases

WINDOW, NUM_TOKENS, K, LENGTHS = 32, 200, 3, (45, 1, 30, 9)
NEAR = {*range(WINDOW - 2, WINDOW + 4), *range(2 * WINDOW, 2 * WINDOW + 4), *range(150, 154)}
"""How long the text is in the rounds that the twin is asked about: at the edge, and far behind it."""

NAMES = deepseek_layout(copies=())
MISTRAL = Case("llama", "mistral", partial(tiny.build, "mistral"), NAMES.published, twin_of(NAMES))
"""A target whose layers all slide."""


def sliding():
    """One case for every target that slides."""
    first = {case.build: case for case in reversed(cases()) if not case.skip}
    types = {build: getattr(build().config.get_text_config(), "layer_types", None) or () for build in first}
    return [MISTRAL, *(first[build] for build, names in types.items() if any("sliding" in name for name in names))]


CASES = pytest.mark.parametrize("case", sliding(), ids=lambda case: case.name)


@cache
def built(case):
    """(target, head) with a window of 32."""
    config = copy.deepcopy(case.build().config)
    config.get_text_config().sliding_window = WINDOW
    model = type(case.build())(config).eval()
    model.load_state_dict(case.build().state_dict())
    row = next(row for row in FAMILIES if row.family == case.family)
    return model, tiny.build_head(model, row, case.num_layers)


@cache
def written(case):
    """What plain decoding makes of every row alone."""
    return [tiny.alone(built(case)[0], row, max_new_tokens=NUM_TOKENS) for row in prompts()]


def prompts():
    return tiny.prompts(len(LENGTHS), lengths=LENGTHS)


def decoder(case, **options):
    model, head = built(case)
    return MTPDecoder.from_model(model, head=head, num_speculative_tokens=K, **options)


def tau(history, wanted):
    """Tokens per round over the rounds whose text is as wanted when they begin."""
    counts = []
    for row, rounds in zip(prompts(), history, strict=True):
        lengths = [len(row) + sum(rounds[:number]) for number in range(len(rounds))]
        counts += [count for length, count in zip(lengths, rounds, strict=True) if wanted(length)]
    return sum(counts) / len(counts)


@CASES
def test_rows_cross_the_edge_one_after_the_other(case):
    decode, options = decoder(case), {"max_new_tokens": NUM_TOKENS, "do_sample": False}
    assert WINDOW in layer_windows(built(case)[0].config.get_text_config(), case.name).values()
    batch = decode.generate(**tiny.padded(prompts()), **options)
    tiny.assert_rows(batch, max(LENGTHS), written(case), f"{case.name}, ragged batch")
    before, after = tau(decode.metrics.history, lambda n: n < WINDOW), tau(decode.metrics.history, lambda n: n > WINDOW + K)
    assert after > 0.75 * before, f"{case.name}: {before:.2f} tokens a round before the edge, {after:.2f} behind it"
    if case.crop:
        row, crossing = prompts()[2], options | {"max_new_tokens": WINDOW}
        found = decoder(case, cache=CropCache).generate(tiny.one(row), **crossing)
        tiny.assert_rows(found, len(row), [written(case)[2][:WINDOW]], f"{case.name} on CropCache")


def worst_errors(case, decode, monkeypatch):
    """{length of the text: how far the head's logits are from those of the twin}, in rounds near the edge and far behind it."""
    (model, head), logits, steps, text, errors = built(case), decode.head.logits, [], prompts()[3], {}
    tensors = {name: tensor.detach() for name, tensor in case.published(head, model).items()}
    monkeypatch.setattr(decode.head, "logits", lambda *args: steps.append(logits(*args)[0]) or logits(*args))
    for chunk in decode.stream(tiny.one(text), max_new_tokens=160, do_sample=False):
        if len(text) in NEAR:
            with torch.no_grad():
                wanted = case.drafts(model, tensors, text, len(steps))
            errors[len(text)] = float((torch.stack(steps) - wanted).abs().max())
        steps.clear()
        text = text + chunk.tokens[0]
    return errors


@CASES
def test_drafts_are_those_of_the_twin_on_both_sides_of_the_edge(case, monkeypatch):
    errors = worst_errors(case, decoder(case), monkeypatch)
    assert min(errors) <= WINDOW < 3 * WINDOW < max(errors), f"rounds began at {sorted(errors)} only"
    assert max(errors.values()) < 1e-4, f"{case.name}: by length of the text, the draft steps' logits are off by {errors}"


def test_the_twin_can_tell(monkeypatch):
    """A head that looks past its window drafts the same text's beginning, and another end."""
    mellum = next(case for case in sliding() if case.name == "mellum")
    model, head = built(mellum)
    blurred = copy.copy(head)
    blurred.config = copy.deepcopy(head.config)
    blurred.config.layer_types = ["full_attention"]
    decode = MTPDecoder.from_model(model, head=blurred, num_speculative_tokens=K)
    errors = worst_errors(mellum, decode, monkeypatch)
    early, late = ({n: error for n, error in errors.items() if (n > WINDOW + 1) == behind} for behind in (False, True))
    assert max(early.values()) < 1e-4, early
    assert min(late.values()) > 1e-3, f"errors of {late} only: the twin would not tell"
