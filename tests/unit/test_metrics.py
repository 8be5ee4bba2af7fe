"""Figures of merit, by hand."""

import math

import pytest

from mtpdecode import Metrics


@pytest.fixture
def two_rows():
    """K = 3. Row 0 appends 3, 1, 4, then 2 with which it ends; row 1 appends 2, 2, and is cut at 1."""
    metrics = Metrics(2)
    metrics.update([3, 2], 3, [False, False])
    metrics.update([1, 2], 3, [False, False])
    metrics.update([4, 1], 3, [False, True])
    metrics.update([2, 0], 3, [True, True])
    return metrics


def test_history_has_what_each_round_appended(two_rows):
    assert two_rows.history == [[3, 1, 4, 2], [2, 2, 1]], "a finished row appends nothing"
    assert two_rows.drafted == [3, 3, 3, 3]
    assert (two_rows.num_rounds, two_rows.num_tokens) == (4, 15)


def test_tau_is_tokens_per_row_and_forward(two_rows):
    assert two_rows.tau == 15 / 7, "row 1 was not decoded in the fourth round"


def test_acceptance_by_position(two_rows):
    """Appending n tokens kept n - 1 drafts and refused the next, if there was one.

    position 1   reached by 3 1 4 2 2, and by 2 (ended: kept 1); not by 1 (ended)        kept by 3 4 2 2 2
    position 2   reached by 3 4 2 2; not by 2 (ended)                                    kept by 3 4
    position 3   reached by 3 4                                                          kept by 4
    """
    assert two_rows.acceptance_rate() == [5 / 6, 2 / 4, 1 / 2]


def test_a_round_that_ends_its_row_counts_for_what_stands_before_the_cut_only():
    metrics = Metrics(1)
    metrics.update([2], 3, [True])
    rates = metrics.acceptance_rate()
    assert rates[0] == 1.0, "one draft token was kept"
    assert math.isnan(rates[1]), "of the second nothing is known: the text ended"


def test_histogram(two_rows):
    assert two_rows.histogram().tolist() == [[0, 1, 1, 1, 1], [0, 1, 2, 0, 0]], "histogram[b, n] rounds in which row b appended n"
    assert two_rows.histogram().sum(-1).tolist() == [4, 3]


def test_rounds_of_different_k():
    """A round that drafted 1 says nothing about position 2."""
    metrics = Metrics(1)
    for count, k in ((2, 1), (1, 3), (4, 3), (1, 0)):
        metrics.update([count], k, [False])
    assert metrics.acceptance_rate() == [2 / 3, 1.0, 1.0]
    assert metrics.tau == 2.0


def test_before_the_first_round():
    metrics = Metrics(2)
    assert math.isnan(metrics.tau)
    assert (metrics.acceptance_rate(), metrics.num_tokens, metrics.num_rounds) == ([], 0, 0)
    assert metrics.histogram().tolist() == [[0, 0], [0, 0]]
    assert "tau=nan" in repr(metrics)


def test_calls_can_be_pooled(two_rows):
    other = Metrics(1)
    other.update([1], 2, [False])
    other.seconds["score"] = 2.5
    two_rows.seconds["score"] = 1.0
    pooled = Metrics.pooled([two_rows, other])
    assert pooled.history == [[3, 1, 4, 2], [2, 2, 1], [1]], "rows side by side"
    assert pooled.tau == 16 / 8
    assert pooled.acceptance_rate() == [5 / 7, 2 / 4, 1 / 2], "rates over all rounds, not a mean of rates"
    assert pooled.seconds["score"] == 3.5
    assert two_rows.num_rounds == 4, "the calls themselves stay as they are"
    assert Metrics.pooled([]).acceptance_rate() == []


def test_the_card_on_one_line(two_rows):
    assert repr(two_rows) == "Metrics(tau=2.14, num_tokens=15, num_rounds=4, acceptance=[0.83, 0.50, 0.50])"
