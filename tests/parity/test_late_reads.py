"""Where a device works beside the host, rounds are begun before the host has read the last: the text is the same."""

import pytest
import torch

from mtpdecode import MTPDecoder
from tests import tiny


class Late(MTPDecoder):
    """Reads late, as on a GPU."""

    late = 1

    def _roles(self, request, options):
        return super()._roles(request, options)._replace(late=self.late)


def late(name, num_layers=1, by=1, **options):
    options.setdefault("num_speculative_tokens", 2)
    decoder = Late.from_model(tiny.target(name), head=tiny.head(name, num_layers), **options)
    decoder.late = by
    return decoder


@pytest.mark.parametrize("name", ["llama", "sliding", "mimo", "deepseek_v3"])
@pytest.mark.parametrize("by", [1, 3])
def test_greedy_text_is_that_of_plain_decoding(name, by):
    rows = tiny.prompts()
    sequences = late(name, by=by).generate(**tiny.padded(rows), max_new_tokens=90, do_sample=False)
    tiny.assert_rows(sequences, 9, [tiny.plain(name, row, max_new_tokens=90) for row in rows], "late")


@pytest.mark.parametrize("num_drafted", [0, 1, 3, "auto"])
def test_whatever_k(num_drafted):
    rows = tiny.prompts()
    decoder = late("llama", 2, num_speculative_tokens=num_drafted)
    sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=40, do_sample=False)
    tiny.assert_rows(sequences, 9, [tiny.plain("llama", row, max_new_tokens=40) for row in rows], "late")


def test_rounds_are_those_of_reading_at_once():
    """Same chunks, same metrics: the round that was begun too many is not among them."""
    batch, options = tiny.padded(tiny.prompts()), {"max_new_tokens": 24, "do_sample": True, "seed": 3}
    decoders = tiny.decoder("llama"), late("llama")
    chunks = [[chunk.tokens for chunk in decoder.stream(**batch, **options)] for decoder in decoders]
    assert chunks[0] == chunks[1]
    assert decoders[0].metrics.history == decoders[1].metrics.history
    assert decoders[0].metrics.drafted == decoders[1].metrics.drafted


def test_a_round_is_begun_before_the_last_is_read():
    order, decoder = [], late("llama")
    step = decoder.step

    def recorded(*args):
        order.append("round")
        return step(*args)

    decoder.step = recorded
    chunks = decoder.stream(torch.tensor([[3, 4, 5]]), max_new_tokens=9, do_sample=False)
    order.extend("read" for _ in chunks)
    assert order[:4] == ["round", "round", "read", "round"]
    assert order[-1] == "read"


def test_stop_strings_and_criteria_end_at_the_same_token():
    ids, plain = torch.tensor([[3, 4, 5, 6]]), tiny.decoder("llama")
    calls = {"stopping_criteria": [lambda ids, scores, **kwargs: ids.shape[1] >= 11], "max_new_tokens": 30, "do_sample": False}
    assert torch.equal(late("llama").generate(ids, **calls), plain.generate(ids, **calls))
