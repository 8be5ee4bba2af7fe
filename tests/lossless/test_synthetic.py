"""Synthetic acceptance keeps as many tokens as it is told, is lossless by no measure, and is reached by no name."""

import pytest
import torch

from mtpdecode import GenerationError, MTPDecoder
from mtpdecode.acceptance import ACCEPTANCE, acceptance_named
from mtpdecode.compiled import CompiledRound
from mtpdecode.testing import SyntheticAcceptance, assert_lossless
from tests import tiny

OPTIONS = {"max_new_tokens": 80, "eos_token_id": -1, "seed": 3}


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_rates_are_those_asked_for(num_rows, do_sample):
    decoder, rates = tiny.decoder("llama", 3), (0.9, 0.6, 0.3)
    kept, reached = [0] * 3, [0] * 3
    for call in range(3 if num_rows == 1 else 1):
        settings = OPTIONS | {"do_sample": do_sample, "seed": call, "acceptance": SyntheticAcceptance(rates)}
        decoder.generate(**tiny.padded(tiny.prompts(num_rows)), **settings)
        for row in decoder.metrics.history:
            for count in row[:-1]:
                for position in range(min(count, 3)):
                    reached[position] += 1
                    kept[position] += count - 1 > position
    for k, rate in enumerate(rates):
        deviation = (rate * (1 - rate) / reached[k]) ** 0.5
        assert abs(kept[k] / reached[k] - rate) < 4 * deviation, f"token {k + 1} of {reached[k]}: {kept[k] / reached[k]:.3f}"


@pytest.mark.parametrize(("rates", "tokens"), [((1.0,), 4), ((0.0,), 1), ((1.0, 0.0), 2)])
def test_certain_rates_give_rounds_of_one_size(rates, tokens):
    """The last rate stands for the positions behind it; a greedy text's rounds end in the target's own token."""
    decoder = tiny.decoder("llama", 3)
    decoder.generate(tiny.one([3, 4]), do_sample=False, acceptance=SyntheticAcceptance(rates), **OPTIONS)
    assert set(decoder.metrics.history[0][:-1]) == {tokens}


def test_with_no_draft_kept_greedy_text_is_plain():
    """So what it appends is the target's own token, at its own place."""
    options = {"max_new_tokens": 30, "do_sample": False}
    found = tiny.decoder("llama", 2).generate(tiny.one([5, 6, 7]), acceptance=SyntheticAcceptance([0.0]), **options)
    assert found[0, 3:].tolist() == tiny.plain("llama", [5, 6, 7], **options)


def test_it_is_not_lossless():
    with pytest.raises(AssertionError, match="SyntheticAcceptance is not lossless"):
        assert_lossless(SyntheticAcceptance([0.7]))


def test_no_name_leads_to_it():
    assert not any(isinstance(rule, SyntheticAcceptance) for rule in ACCEPTANCE.values())
    for name in ("synthetic", "SyntheticAcceptance"):
        with pytest.raises(GenerationError, match="known rules are"):
            acceptance_named(name)


@pytest.mark.parametrize("rates", [[], [1.1], [0.5, -0.1]])
def test_rates_are_chances(rates):
    with pytest.raises(GenerationError, match="0 to 1"):
        SyntheticAcceptance(rates)


def test_lives_in_one_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rule, batch = SyntheticAcceptance([0.8, 0.5]), tiny.padded(tiny.prompts(3))
    decoder = MTPDecoder.from_model(tiny.target("llama"), head=tiny.head("llama"), num_speculative_tokens=2, acceptance=rule)
    plain = decoder.generate(**batch, max_new_tokens=20, do_sample=False, seed=1)
    decoder.step = CompiledRound("eager")
    assert torch.equal(decoder.generate(**batch, max_new_tokens=20, do_sample=False, seed=1), plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
