"""Mamba-2 in transformers holds the time steps of many tokens to limits, and not that of a single one.

Plain decoding reads the prompt at once and then token by token, so it holds the prompt's tokens to the limits and those that it
writes to none. A window of several drafted tokens would hold them all: here the limits are so narrow that this changes the text.
"""

import pytest
import torch

from mtpdecode import MTPDecoder, recurrent
from mtpdecode.families import FAMILIES
from tests import tiny
from tests.families.zoo import nemotron_h

NUM_TOKENS, LENGTHS = 24, (9, 1, 4, 30)


@pytest.fixture(scope="module")
def decoder():
    model = nemotron_h.build(time_step_min=0.5)
    row = next(row for row in FAMILIES if row.family == "nemotron_h")
    return MTPDecoder.from_model(model, head=tiny.build_head(model, row))


@pytest.fixture(scope="module")
def expected(decoder):
    return [tiny.alone(decoder.target, row, max_new_tokens=NUM_TOKENS) for row in rows()]


def rows():
    return tiny.prompts(len(LENGTHS), lengths=LENGTHS)


def texts(decoder, **options):
    found = decoder.generate(**tiny.padded(rows()), max_new_tokens=NUM_TOKENS, do_sample=False, **options)
    return [row[max(LENGTHS) :].tolist() for row in found]


@pytest.mark.parametrize("options", [{"num_speculative_tokens": k} for k in (0, 1, 3, 17)] + [{"prefill_chunk_size": 4}], ids=str)
def test_text_is_that_of_generate(decoder, expected, options):
    """K = 0 and 17: windows of one token, and such as are too long to be replayed token by token."""
    found = decoder.generate(**tiny.padded(rows()), max_new_tokens=NUM_TOKENS, do_sample=False, **options)
    tiny.assert_rows(found, max(LENGTHS), expected, str(options))


def limits_for_all(monkeypatch):
    monkeypatch.setattr(recurrent, "KINDS", tuple(kind._replace(limits="") for kind in recurrent.KINDS))


def limits_for_none(monkeypatch):
    monkeypatch.setattr(recurrent._Limits, "applied", lambda self, output, prompt: output)


def limits_but_for_the_last(monkeypatch):
    applied = recurrent._Limits.applied
    monkeypatch.setattr(recurrent._Limits, "applied", lambda self, output, prompt: applied(self, output, prompt - 1))


@pytest.mark.parametrize("plant", [limits_for_all, limits_for_none, limits_but_for_the_last])
def test_a_planted_fault_is_seen(decoder, expected, plant, monkeypatch):
    plant(monkeypatch)
    assert texts(decoder, num_speculative_tokens=3) != expected, f"{plant.__name__} leaves every row's text as it is"


def test_the_limits_are_put_back(decoder, monkeypatch):
    """Whatever happens inside a forward pass."""
    mixers = [module for module in decoder.target.modules() if type(module).__name__ == "NemotronHMamba2Mixer"]
    limits = [mixer.time_step_limit for mixer in mixers]
    assert limits == [(0.5, torch.inf)] * 2
    texts(decoder)
    assert [mixer.time_step_limit for mixer in mixers] == limits

    def fail(*_):
        assert mixers[0].time_step_limit == (0.0, torch.inf)
        raise KeyboardInterrupt

    handle = decoder.target.get_decoder().norm_f.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        texts(decoder)
    handle.remove()
    assert [mixer.time_step_limit for mixer in mixers] == limits
