"""K per round: fixed, or a user's own schedule. Whatever it says, the text stays."""

import pytest
import torch

from mtpdecode import DraftSchedule, FixedLength, GenerationError, Metrics
from mtpdecode.schedule import schedule_for
from tests import tiny

LENGTH = 24


class Cycling(DraftSchedule):
    """1, 3, 0, 2, and again."""

    choices = (0, 1, 2, 3)

    def next_length(self, metrics):
        return (1, 3, 0, 2)[metrics.num_rounds % 4]


class Cautious(DraftSchedule):
    """Drafts one more than was kept in the round before: looks at what the call has seen."""

    choices = (1, 2, 3, 4)

    def next_length(self, metrics):
        return min(metrics.history[0][-1], 4) if metrics.history[0] else 4


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama", "sliding", "deepseek_v3"])
def test_a_users_schedule_gives_the_same_text(name, num_layers):
    rows = tiny.prompts()
    expected = [tiny.plain(name, row, max_new_tokens=LENGTH) for row in rows]
    decoder = tiny.decoder(name, Cycling(), num_layers)
    sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=LENGTH, do_sample=False)
    tiny.assert_rows(sequences, 9, expected, f"{name}, K = 1, 3, 0, 2, ...")
    assert decoder.metrics.drafted[:8] == [1, 3, 0, 2, 1, 3, 0, 2]


def test_a_schedule_sees_the_metrics_of_its_call():
    decoder, row = tiny.decoder("llama", 2), tiny.prompts()[0]
    options = {"max_new_tokens": LENGTH, "do_sample": False, "num_speculative_tokens": Cautious()}
    expected = tiny.plain("llama", row, max_new_tokens=LENGTH)
    assert decoder.generate(tiny.one(row), **options).tolist() == [row + expected]
    drafted, counts = decoder.metrics.drafted, decoder.metrics.history[0]
    assert drafted == [4] + [min(count, 4) for count in counts[:-1]], "each round's K follows from the round before"


def test_coupled_sampling_does_not_see_the_schedule():
    batch, options = tiny.padded(tiny.prompts()), {"max_new_tokens": LENGTH, "do_sample": True, "seed": 3}
    options["acceptance"] = "coupled"
    plain = tiny.decoder("llama", 0).generate(**batch, **options)
    assert torch.equal(tiny.decoder("llama", Cycling(), 2).generate(**batch, **options), plain)


def test_a_fixed_length_is_fixed():
    assert FixedLength(3).choices == (3,)
    assert FixedLength(3).next_length(Metrics(1)) == 3
    assert schedule_for(2).choices == (2,)
    assert schedule_for(0).next_length(Metrics(1)) == 0
    own = Cycling()
    assert schedule_for(own) is own


@pytest.mark.parametrize("wrong", [-1, True, False, 2.0, "3", None, [1], torch.tensor(2)])
def test_what_is_no_k(wrong):
    with pytest.raises(GenerationError, match=r"(?s)num_speculative_tokens=.* was asked for; it must be an int of at least 0"):
        schedule_for(wrong)


def test_a_schedule_keeps_to_its_choices():
    class Lying(DraftSchedule):
        choices = (1, 2)

        def next_length(self, metrics):
            return 7

    with pytest.raises(GenerationError, match=r"Lying asked for K=7; its choices are \(1, 2\).*Name every K in choices"):
        tiny.decoder("llama", Lying()).generate(tiny.one([5, 6]), max_new_tokens=4)
