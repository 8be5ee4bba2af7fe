"""K per round: fixed, or a user's own schedule. Whatever it says, the text stays."""

from collections import Counter
from math import prod
from random import Random

import pytest
import torch

from mtpdecode import DraftSchedule, FixedLength, GenerationError, Metrics, MTPDecoder, MTPProposer
from mtpdecode.schedule import SPREAD, ExpectedSpeedup, Place, Seen, Trial, schedule_for, usual_pace
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


class Remembering(MTPProposer):
    """Writes down what was drafted behind which text."""

    def begin(self, call, cache):
        super().begin(call, cache)
        self.drafts = self.head.drafts

    def propose(self, state, num_speculative_tokens, noise):
        draft = super().propose(state, num_speculative_tokens, noise)
        for row, (tokens, is_done) in enumerate(zip(draft.tokens.tolist(), state.done.tolist(), strict=True)):
            if not is_done:
                self.drafts.setdefault(tuple(state.text.prefix(row)[0].tolist()), []).append(tokens)
        return draft


class Wandering(DraftSchedule):
    """Longer and shorter, with plain rounds between some."""

    choices = (0, 1, 2, 3, 5)

    def next_length(self, metrics):
        return (5, 1, 1, 3, 0, 2, 5, 0, 0, 1, 2, 1, 5, 5, 3)[metrics.num_rounds % 15]


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama", "sliding", "deepseek_v3"])
def test_drafts_hang_on_the_text_and_not_on_the_k_before(name, num_layers):
    """Whatever was drafted before, behind the same text stands the same draft: no row of the head's is missing, or wrong."""
    found = []
    for schedule in (5, Wandering()):
        head = tiny.build_head(tiny.target(name), tiny.row_of(name), num_layers)
        head.drafts = {}
        decoder = MTPDecoder.from_model(tiny.target(name), proposer=Remembering(head), num_speculative_tokens=schedule)
        decoder.generate(**tiny.padded(tiny.prompts()), max_new_tokens=LENGTH, do_sample=False)
        found.append(head.drafts)
    common = found[0].keys() & found[1].keys()
    assert len(common) > 20
    for text in common:
        wanted = found[0][text][0]
        assert all(tokens == wanted[: len(tokens)] for tokens in found[1][text]), f"behind {text}: {found[1][text]}, not {wanted}"


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


# ── measured lengths ────────────────────────────────────────────────────────────────────────────────────────────────────────


def simulated(rates, costs, num_rounds=400, schedule=None, seed=0, noise=0.1):
    """Rounds whose draft token k is kept with chance rates[k], and that take costs[K] and some noise -> K of every round."""
    chance, used = Random(seed), []
    schedule = schedule or ExpectedSpeedup(range(len(costs)))
    for number in range(num_rounds):
        length = schedule.next_length(Metrics(1))
        count = 1 + next((k for k in range(length) if chance.random() >= rates[k]), length)
        seconds = costs[length] * (1 + noise * chance.random())
        schedule.observe(Seen(length, [count], [False], seconds, 100 + number))
        used.append(length)
    return used


def rate_of(length, rates, costs):
    """Tokens a second of one K, exactly."""
    return sum(prod(rates[:k]) for k in range(length + 1)) / costs[length]


CHEAP, DEAR = (1, 1.1, 1.2, 1.3, 1.4), (1, 1.6, 1.9, 2.2, 2.5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("rates", "costs"),
    [((0.8, 0.7, 0.6, 0.5), CHEAP), ((0.3,) * 4, CHEAP), ((0.95,) * 4, CHEAP), ((0,) * 4, CHEAP), ((0.5,) * 4, DEAR)],
)
def test_the_length_that_pays_most_is_found(rates, costs, seed):
    used = simulated(rates, costs, seed=seed)
    found = sum(sum(prod(rates[:k]) for k in range(length + 1)) for length in used) / sum(costs[length] for length in used)
    best = max(rate_of(length, rates, costs) for length in range(5))
    assert found > 0.95 * best, f"{found:.3f} tokens a second where {best:.3f} could be had; it drafted {Counter(used)}"


def batches(schedule, mean, costs, seed, num_batches=12, num_rows=8, length=64):
    """Batches whose rows differ in how often a draft is kept, and go on until the slowest has ended -> time of all rounds."""
    chance, seconds = Random(seed), 0.0
    for _ in range(num_batches):
        schedule.begin(num_rows, 40)
        rates, left = [min(max(chance.gauss(mean, 0.1), 0.0), 0.95) for _ in range(num_rows)], [length] * num_rows
        while any(left):
            k, counts = schedule.next_length(Metrics(num_rows)), []
            for row, rate in enumerate(rates):
                kept = next((position for position in range(k) if chance.random() >= rate), k)
                counts.append(min(kept + 1, left[row]))
                left[row] -= counts[-1]
            took = costs[k] * chance.gauss(1, 0.04)
            schedule.observe(Seen(k, counts, [not each for each in left], took, 40 + length - min(left)))
            seconds += took
    return seconds / (num_batches * length * costs[0])


@pytest.mark.parametrize(("mean", "cost", "most"), [(0.4, 1.3, 1.02), (0.4, 1.2, 1.015), (0.52, 1.3, 1.015), (0.6, 1.1, 0.8)])
def test_a_batch_goes_by_its_slowest_row(mean, cost, most):
    """What all rows keep on average promises more than comes: the batch ends when the last of them does."""
    costs = {0: 1.0, 1: cost, 3: 1 + 3 * (cost - 1)}
    took = sum(batches(ExpectedSpeedup({0, 1, 3}), mean, costs, seed) for seed in range(6)) / 6
    assert took < most, f"{took:.3f} of the time of plain decoding"


@pytest.mark.parametrize(("num_rows", "cost"), [(4, 1.36), (8, 1.36), (16, 1.2), (16, 1.36), (64, 1.15), (64, 1.3)])
@pytest.mark.parametrize("mean", [0.0, 0.4, 0.52])
def test_a_batch_is_never_slower_than_plain(num_rows, cost, mean):
    """3 % at most, from the first batch on, with each K measured a few times: what was lost to trying is in it."""
    costs = {0: 1.0, 1: cost, 3: 1 + 3 * (cost - 1)}
    took = [batches(ExpectedSpeedup({0, 1, 3}), mean, costs, seed, num_batches=3, num_rows=num_rows) for seed in range(4)]
    assert max(took) < 1.03, f"{max(took):.3f} of the time of plain decoding"


@pytest.mark.parametrize("num_rows", [2, 4, 8, 16, 64])
def test_the_usual_pace_is_that_of_the_slowest_of_as_many(num_rows):
    chance = Random(0)
    slowest = [min(chance.gauss(1, SPREAD) for _ in range(num_rows)) for _ in range(20_000)]
    assert usual_pace(num_rows) == pytest.approx(sum(slowest) / len(slowest), abs=0.01)


def test_the_usual_pace_of_one_row_is_1():
    assert usual_pace(1) == pytest.approx(1.0)


def test_a_head_that_is_never_right_is_left_alone():
    used = simulated((0,) * 4, CHEAP)
    assert Counter(used[-200:])[0] >= 180, f"{Counter(used[-200:])}"
    assert sum(length > 0 for length in used[-200:]) > 0, "and yet tried again: the text may change"


def test_a_change_of_the_text_is_noticed():
    schedule = ExpectedSpeedup(range(5))
    simulated((0.1,) * 4, DEAR, schedule=schedule)
    used = simulated((0.95,) * 4, DEAR, schedule=schedule)
    assert Counter(used[-100:])[4] > 80, f"{Counter(used[-100:])}"


def test_rows_that_end_say_nothing_about_what_is_behind_their_end():
    schedule = ExpectedSpeedup(range(3))
    schedule.begin(2, 10)
    for _ in range(100):
        schedule.observe(Seen(2, [1, 0], [True, True], 1.0, 10))
    slowest = usual_pace(2)
    expected = 1 + slowest / 2 + slowest**2 / 4
    assert schedule.outlook()[2].tokens == pytest.approx(expected), "nothing was learnt: a_1 = a_2 = 1/2 as at first"


def test_auto_gives_the_same_text():
    rows = tiny.prompts()
    expected = [tiny.plain("llama", row, max_new_tokens=LENGTH) for row in rows]
    decoder = tiny.decoder("llama", "auto")
    for _ in range(2):
        sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=LENGTH, do_sample=False)
        tiny.assert_rows(sequences, 9, expected, "auto")
    assert len(set(decoder.metrics.drafted)) > 0


@pytest.mark.parametrize(("choices", "start"), [((), 0), ((0,), 0), ((1, 2), 1), ((0, 1, 2), 3), ((0, 2), 1), ((-1, 0, 1), 0)])
def test_choices_that_are_none(choices, start):
    with pytest.raises(GenerationError, match=r"choices must hold 0 \(plain decoding\), a larger K and start"):
        ExpectedSpeedup(choices, start)


@pytest.mark.parametrize("seed", range(3))
def test_choices_may_have_gaps(seed):
    rates, costs = (0.9, 0.9, 0.9, 0.9, 0.9), (1, 1.1, 1.2, 1.3, 1.4, 1.5)
    used = simulated(rates, costs, schedule=ExpectedSpeedup((0, 1, 3, 5)), seed=seed)
    assert set(used) <= {0, 1, 3, 5}
    assert Counter(used)[5] > 300, f"{Counter(used)}"


def test_a_round_that_was_compiled_does_not_end_exploring():
    schedule = ExpectedSpeedup((0, 1))
    schedule.observe(Seen(1, [1], [False], 60.0, 10))
    used = simulated((0,), (1, 1.1), schedule=schedule)
    assert used[:300].count(1) > 3, "60 seconds were not paid for being tried"


def test_auto_is_the_default_and_its_k_suits_the_head():
    assert schedule_for("auto", 3).choices == (0, 1, 3, 5)
    assert schedule_for("auto", 1).choices == (0, 1, 3)
    decoder = MTPDecoder.from_model(tiny.target("llama"), head=tiny.head("llama"))
    assert isinstance(decoder.options.schedule, ExpectedSpeedup)
    assert decoder.options.schedule.choices == (0, 1, 3)


def test_a_seeded_text_does_not_hang_on_the_clock():
    """What auto measures decides its K, and with drafts that were drawn, K decides which of the law's texts is written."""
    decoder, seeded = MTPDecoder.from_model(tiny.target("llama"), head=tiny.head("llama")), {"do_sample": True, "seed": 1}
    batch = tiny.padded(tiny.prompts())
    texts = [decoder.generate(**batch, max_new_tokens=LENGTH, **seeded) for _ in range(3)]
    assert set(decoder.metrics.drafted) == {1}, "the head's own K, all the way"
    assert all(torch.equal(text, texts[0]) for text in texts)
    decoder.generate(**batch, max_new_tokens=LENGTH, **seeded, num_speculative_tokens="auto")
    assert 0 in decoder.metrics.drafted, "who asks for auto gets it"
    decoder.generate(**batch, max_new_tokens=LENGTH, **seeded, acceptance="coupled")
    assert 0 in decoder.metrics.drafted, "coupled texts are the same for every K"


def test_warmup_measures_every_length(capsys):
    decoder = MTPDecoder.from_model(tiny.target("llama"), head=tiny.head("llama"), num_speculative_tokens="auto")
    decoder.warmup(batch_sizes=(1, 3), num_tokens=8, progress=False)
    for each in decoder.options.schedule.outlook():
        assert each.rounds >= 2, f"{each}"
        assert each.seconds > 0
    decoder.explain()
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert [table.splitlines()[0] for table in tables] == ["1 row, texts of 8 to 15 tokens", "3 rows, texts of 8 to 15 tokens"]
    for table in tables:
        assert "tokens/s" in table
        assert len(table.splitlines()) == 2 + len(decoder.options.schedule.choices)
        assert table.count(">") == 1


def test_warmup_takes_several_lengths(capsys):
    decoder, prompts = tiny.decoder("llama", "auto"), []
    prefilled = decoder.stream
    decoder.stream = lambda inputs, **options: prompts.append(tuple(inputs.shape)) or prefilled(inputs, **options)
    decoder.warmup(batch_sizes=(1, 2), num_tokens=(8, 40), num_rounds=2, progress=False)
    assert prompts == [(1, 8), (1, 40), (2, 8), (2, 40)], "one call each, whatever the number of K"
    schedule = decoder.options.schedule
    for rows, tokens in prompts:
        place = Place(rows, tokens.bit_length())
        assert [each.rounds for each in schedule.outlook(place)] == [2] * len(schedule.choices), f"{place}"
    decoder.explain()
    assert capsys.readouterr().out.count("tokens/round") == 4


def test_explain_says_what_was_measured(capsys):
    schedule = ExpectedSpeedup((0, 1))
    for rows, tokens, seconds in [(1, 100, 0.5), (4, 5000, 0.25)]:
        for k in (0, 1):
            schedule.time(k, rows, tokens, seconds * (1 + k))
    decoder = tiny.decoder("llama", schedule)
    decoder.explain()
    first, second = capsys.readouterr().out.strip().split("\n\n")
    assert first.splitlines()[0] == "1 row, texts of 64 to 127 tokens"
    assert second.splitlines()[0] == "4 rows, texts of 4096 to 8191 tokens"
    columns = [table.splitlines()[-1].split() for table in (first, second)]
    assert [each[-4:-2] for each in columns] == [["1000.0", "1000.0"], ["500.0", "500.0"]], "K = 1: expected and measured ms"


def test_warmup_leaves_a_decoder_as_it_was():
    decoder, row = tiny.decoder("llama", "auto"), tiny.prompts()[0]
    decoder.warmup(progress=False, num_tokens=8, num_rounds=2)
    assert (decoder.verifier, decoder.cache, decoder.metrics) == (None, None, None)
    decoder.generate(tiny.one(row), max_new_tokens=8, do_sample=False)
    shown = decoder.verifier, decoder.cache, decoder.metrics
    lengths, tokens = decoder.cache.lengths.tolist(), [each.tokens for each in decoder.options.schedule.outlook()]
    decoder.warmup(progress=False, num_tokens=(8, 16), num_rounds=2)
    assert (decoder.verifier, decoder.cache, decoder.metrics) == shown
    assert decoder.cache.lengths.tolist() == lengths, "nor does another text lie in its cache"
    assert [each.tokens for each in decoder.options.schedule.outlook()] == tokens, "nothing was learnt about acceptance"
    again = decoder.generate(tiny.one(row), max_new_tokens=8, do_sample=False)
    assert again[0, len(row) :].tolist() == tiny.plain("llama", row, max_new_tokens=8)
    assert decoder.cache is shown[1], "and the next call finds the cache of the last one"


def test_a_trial_changes_k_and_counts_what_says_something():
    trial, before = Trial((0, 1, 2), 5), None
    for number, k in enumerate(trial.lengths):
        assert trial.next_length(Metrics(1)) == k
        trial.observe(Seen(k, [1], [False], float(number), 10))
        is_first, teaches = number < 3, k > 0 and before == 0
        assert (number in trial.seconds[k]) == (not is_first and not teaches), f"round {number}, K = {k} behind {before}"
        before = k
    assert [len(seconds) for seconds in trial.seconds.values()] == [5, 5, 5]
    assert sorted(trial.lengths[:3]) == [0, 1, 2], "the first round of each may be compiled"
    orders = {tuple(trial.seconds[k][number] - trial.seconds[0][number] for k in (1, 2)) for number in range(5)}
    assert len(orders) > 1, "in another order each time"


def test_explain_without_auto(capsys):
    tiny.decoder("llama", 2).explain()
    assert "K is always 2" in capsys.readouterr().out


def test_a_call_with_more_rows_goes_by_their_costs_from_its_first_round():
    schedule = ExpectedSpeedup((0, 1))
    simulated((0.9,), (1, 1.1), schedule=schedule)
    for k in (0, 1):
        for _ in range(3):
            schedule.time(k, 64, 100, 1.0 + 2.0 * k)
    schedule.begin(1, 500)
    assert schedule.next_length(Metrics(1)) == 1
    schedule.begin(64, 100)
    assert schedule.next_length(Metrics(64)) == 0, "a draft that triples the round"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("costs", [(1, 1.01, 1.02), (1, 1.1, 1.2), (1, 2.0, 3.0)])
def test_noise_does_not_make_useless_drafts_seem_free(costs, seed):
    """Rounds take up to half as long again by chance; a head that is never right costs 3 % at most all the same."""
    schedule = ExpectedSpeedup((0, 1, 2))
    simulated((0, 0), costs, 40, schedule, seed=seed, noise=0.5)
    used = simulated((0, 0), costs, 600, schedule, seed=seed + 10, noise=0.5)
    assert sum(costs[k] for k in used) < 1.03 * len(used), f"{Counter(used)}"
