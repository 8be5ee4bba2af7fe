"""The keyed noise: uniform, independent where it must be, the same where it must be.

All seeds are fixed. Should the hash ever change, each statistic is refused by chance with a probability of at most 1e-4.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from mtpdecode.request import seeds_for
from mtpdecode.sampling import race
from mtpdecode.state import Noise, Purpose, _to_unit

ALPHA = 1e-4
PURPOSES = (Purpose.TARGET, Purpose.DRAFT, Purpose.ACCEPT)
ROWS, POSITIONS = 2000, 250


def noise(num_rows=ROWS, seed=0):
    return Noise(seeds_for(seed, torch.zeros(num_rows)))


def positions(num_rows=ROWS, num=POSITIONS):
    return torch.arange(num).expand(num_rows, num)


def exponentials(purpose, num_rows=ROWS, num_tokens=250, position=7, seed=0):
    return noise(num_rows, seed).exponential(torch.full((num_rows,), position), purpose, num_tokens)


# ── the same numbers everywhere ─────────────────────────────────────────────────────────────────────────────────────────────

WORD = 2**32 - 1


def slow_mix(x):
    """MurmurHash3's 32-bit finaliser, in Python's integers."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & WORD
    return x ^ (x >> 16)


def slow_keys(words):
    low, high = 0, 1
    for word in words:
        low = slow_mix(low ^ (word & WORD))
        high = slow_mix((high * 5 + low) & WORD)
    return high, low


def slow_unit(bits):
    return min((np.float32(bits & 0x7FFFFFFF) + np.float32(0.5)) * np.float32(2.0**-31), np.float32(1 - 2.0**-24))


def slow_uniform(seed, position, purpose, *start):
    high, low = slow_keys([seed, seed >> 32, position, purpose, *start])
    return slow_unit(slow_mix(slow_mix(low) ^ high))


def slow_exponential(seed, position, purpose, token):
    high, low = slow_keys([seed, seed >> 32, position, purpose])
    return -math.log1p(-slow_unit(slow_mix(slow_mix((token * 0x9E3779B9 + low) & WORD) ^ high)))


SEEDS = [0, 1, 2**24, 2**31, 2**32 + 5, 2**61 + 12345, 2**63 - 1]


def test_integer_arithmetic_equals_the_slow_twin():
    """int32 tensors that overflow give the numbers that Python's integers give, for seeds of any size."""
    fast, where = Noise(torch.tensor(SEEDS)), torch.tensor([[0, 1, 77, 2**20]]).expand(len(SEEDS), -1)
    for purpose in PURPOSES:
        wanted = [[slow_uniform(seed, at, purpose) for at in row] for seed, row in zip(SEEDS, where.tolist(), strict=True)]
        assert fast.uniform(where, purpose).tolist() == [[float(u) for u in row] for row in wanted]
        wanted = [[slow_exponential(seed, 77, purpose, token) for token in (0, 1, 49151)] for seed in SEEDS]
        numbers = fast.exponential(where[:, 2], purpose, 49152)[:, [0, 1, 49151]]
        assert torch.allclose(numbers.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6)


def test_rounds_have_draft_and_acceptance_numbers_of_their_own():
    """The round's start is one more word of the key; the target's numbers do not know it."""
    fast, where, starts = Noise(torch.tensor(SEEDS)), torch.full((len(SEEDS), 1), 77), torch.arange(70, 70 + len(SEEDS))
    for purpose in (Purpose.DRAFT, Purpose.ACCEPT):
        wanted = [[float(slow_uniform(seed, 77, purpose, int(start)))] for seed, start in zip(SEEDS, starts, strict=True)]
        assert fast.of_round(starts).uniform(where, purpose).tolist() == wanted
    same = fast.of_round(starts).exponential(where[:, 0], Purpose.TARGET, 9)
    assert torch.equal(same, fast.exponential(where[:, 0], Purpose.TARGET, 9))


def test_rows_take_their_numbers_with_them():
    """Permuting the rows permutes the numbers: nothing depends on the place in the batch."""
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    rows, where = noise(), torch.arange(ROWS)
    permuted = Noise(rows.seeds[order])
    assert torch.equal(permuted.exponential(where[order], Purpose.DRAFT, 50), rows.exponential(where, Purpose.DRAFT, 50)[order])
    assert torch.equal(permuted.uniform(positions()[order], 3), rows.uniform(positions(), 3)[order])


def test_a_token_keeps_its_number():
    """A larger vocabulary adds numbers and changes none; a window of more positions likewise."""
    assert torch.equal(exponentials(1, num_tokens=1000)[:, :10], exponentials(1, num_tokens=10))
    assert torch.equal(noise().uniform(positions(), 3)[:, 5:9], noise().uniform(positions()[:, 5:9], 3))


def test_a_row_alone_has_the_seed_of_its_row():
    """An int seed gives row 0 what [seed] gives a row alone; a list gives every row its own."""
    like = torch.zeros(3)
    assert seeds_for(5, like)[0] == seeds_for([5], like[:1])[0]
    assert torch.equal(seeds_for([9, 5, 7], like)[[1]], seeds_for([5], like[:1]))
    assert len({*seeds_for(5, like).tolist(), *seeds_for(6, like).tolist()}) == 6


# ── uniform ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("purpose", PURPOSES)
def test_uniform(purpose):
    """500,000 numbers over rows and positions are uniform in the open interval (0, 1): Kolmogorov-Smirnov, and 1,000 cells."""
    numbers = noise().uniform(positions(), purpose).flatten().double()
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.numpy(), "uniform").pvalue > ALPHA
    assert stats.chisquare(torch.histc(numbers, 1000, 0, 1).numpy()).pvalue > ALPHA


@pytest.mark.parametrize("axis", ["tokens", "rows", "positions", "starts"])
def test_exponential(axis):
    """Along each of the axes that key them the numbers are Exp(1): distribution, and the first four moments n!."""
    num = 100_000
    if axis == "tokens":
        numbers = exponentials(Purpose.TARGET, num_rows=1, num_tokens=num)
    elif axis == "rows":
        numbers = exponentials(Purpose.TARGET, num_rows=num, num_tokens=1)
    elif axis == "positions":
        numbers = Noise(torch.full((num,), 3)).exponential(torch.arange(num), Purpose.TARGET, 1)
    else:
        numbers = Noise(torch.full((num,), 3)).of_round(torch.arange(num)).exponential(torch.full((num,), 9), Purpose.DRAFT, 1)
    numbers = numbers.flatten().double()
    assert stats.kstest(numbers.numpy(), "expon").pvalue > ALPHA
    for power in (1, 2, 3, 4):
        deviation = math.sqrt((math.factorial(2 * power) - math.factorial(power) ** 2) / num)
        assert abs(numbers.pow(power).mean() - math.factorial(power)) < 4.5 * deviation


def test_extreme_numbers_stay_finite():
    """Bits of all zeros and all ones give a number above 0 and below 1, whose exponential is finite and not 0."""
    ends = _to_unit(torch.tensor([0, -1, 2**31 - 1, -(2**31)], dtype=torch.int32))
    assert 0 < ends.min() < 1e-9
    assert ends.max() < 1
    assert (-torch.log1p(-ends)).isfinite().all()


# ── independent ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def assert_independent(first, second):
    """No linear correlation, and a uniform 10 x 10 table of (first, second)."""
    first, second = first.flatten().double(), second.flatten().double()
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
    assert abs(correlation) * math.sqrt(len(first)) < 4.5, f"correlation {correlation:.4f}"
    cells = torch.bincount((first * 10).long() * 10 + (second * 10).long(), minlength=100)
    assert stats.chisquare(cells.numpy()).pvalue > ALPHA


def uniforms(seed=0, purpose=Purpose.ACCEPT, starts=None):
    source = noise(seed=seed)
    if starts is not None:
        source = source.of_round(torch.full((ROWS,), starts))
    return source.uniform(positions(), purpose)


@pytest.mark.parametrize("lag", [1, 2, 16])
def test_positions_and_rows_are_independent(lag):
    """A number says nothing of those of the next positions and rows."""
    assert_independent(uniforms()[:, :-lag], uniforms()[:, lag:])
    assert_independent(uniforms()[:-lag], uniforms()[lag:])


@pytest.mark.parametrize("other", [1, 2, 2**20, 2**38])
def test_seeds_are_independent(other):
    """A seed says nothing of its neighbours."""
    assert_independent(uniforms(), uniforms(seed=other))


def test_rounds_are_independent():
    """The acceptance numbers of one position in two rounds are independent: refused positions are tested again."""
    assert_independent(uniforms(starts=7), uniforms(starts=8))


@pytest.mark.parametrize("first", PURPOSES)
@pytest.mark.parametrize("second", PURPOSES)
def test_purposes_are_independent(first, second):
    """Draft, target and acceptance numbers of one place say nothing of each other, token by token; nor do two tokens' numbers."""
    one, other = ((-exponentials(purpose)).exp() for purpose in (first, second))
    if first != second:
        assert_independent(one, other)
        assert_independent(uniforms(purpose=first), uniforms(purpose=second))
    for lag in (1, 2, 64):
        assert_independent(one[:, :-lag], other[:, lag:])


@pytest.mark.parametrize("purpose", [Purpose.TARGET, Purpose.DRAFT])
def test_acceptance_is_independent_of_each_token(purpose):
    """The number that tests a token says nothing of the race in which the token was drawn, nor of the one that replaces it."""
    at = torch.full((100_000,), 7)
    rows = noise(100_000)
    tests, races = rows.uniform(at[:, None], Purpose.ACCEPT)[:, 0], (-rows.exponential(at, purpose, 3)).exp()
    for token in range(3):
        assert_independent(tests, races[:, token])


# ── races ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0, 4.0], [1e-3, 1.0, 0.0, 2.0], [5e-7, 3e-7, 2e-7, 0.0]], ids=str)
def test_races_are_won_in_proportion(weights):
    """100,000 races: each token wins as often as its share of the weights says, whatever their sum; weight 0 never wins."""
    weights = torch.tensor(weights)
    winners = race(weights.expand(100_000, -1), exponentials(Purpose.TARGET, num_rows=100_000, num_tokens=4))
    counts, expected = torch.bincount(winners, minlength=4).double(), weights.double() / weights.double().sum() * 100_000
    assert (counts[weights == 0] == 0).all()
    possible = weights > 0
    assert stats.chisquare(counts[possible].numpy(), expected[possible].numpy()).pvalue > ALPHA


def test_races_over_a_real_vocabulary():
    """49,152 tokens, one of them with half of the weight: it wins half of 200 races, and the others evenly."""
    weights = torch.ones(49_152)
    weights[7] = 49_151
    winners = race(weights.expand(200, -1), exponentials(Purpose.TARGET, num_rows=200, num_tokens=49_152))
    assert stats.binomtest(int((winners == 7).sum()), 200, 0.5).pvalue > ALPHA
    assert stats.kstest(winners[winners != 7].numpy() / 49_152, "uniform").pvalue > ALPHA


def test_racing_laws_draw_the_same_token_where_they_agree():
    """Two laws that share their noise draw the same token with probability sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)."""
    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.3, 0.3, 0.1, 0.3])
    shared = exponentials(Purpose.TARGET, num_rows=100_000, num_tokens=4)
    same = int((race(p.expand(100_000, -1), shared) == race(q.expand(100_000, -1), shared)).sum())
    wanted = float((1 / torch.maximum(p / p[:, None], q / q[:, None]).sum(-1)).sum())
    assert stats.binomtest(same, 100_000, wanted).pvalue > ALPHA
