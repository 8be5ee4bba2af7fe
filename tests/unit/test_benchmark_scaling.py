"""`benchmarks.scaling`: fits find what made-up figures are made of, turns count what they say, the script runs to its end."""

import json
import math
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from benchmarks import scaling
from benchmarks.scaling import COMPILED, EAGER, OTHERS, OURS, WHOLE, Place, Row, Turns
from tests import tiny

OWN, HEADS = scaling.ATTENTIONS


@pytest.fixture(autouse=True)
def _no_graphs_of_others():
    torch._dynamo.reset()


def test_the_fit_finds_a_power_law():
    xs = [128, 512, 2048, 8192]
    assert scaling.exponent(xs, [0.3 * x**1.25 for x in xs]) == pytest.approx(1.25)
    assert scaling.exponent(xs, [7.0] * 4) == pytest.approx(0.0)
    assert math.isnan(scaling.exponent(xs, [0.0, 1.0, 2.0, 3.0])), "what takes no time has no exponent"
    assert math.isnan(scaling.exponent([4, 4], [1.0, 2.0])), "one place is no series"


def test_the_fit_finds_a_line():
    assert scaling.line([1, 2, 5], [7.0, 9.0, 15.0]) == pytest.approx((5.0, 2.0))
    assert scaling.line([0, 1, 2], [1.0, 4.0, 1.0]) == pytest.approx((2.0, 0.0)), "least squares, not the ends"


def made_up(axis, num_rows, context, k):
    """Attention grows with every token, ours with none; all of it with the rows."""
    kinds = {OWN: 0.001 * context, HEADS: 0.0001 * context, OTHERS: 4.0 * (k + 1), OURS: 2.0}
    kinds = {WHOLE: sum(kinds.values()), **kinds}
    kinds = {kind: ms * num_rows**0.5 for kind, ms in kinds.items()}
    return Row(EAGER, axis, num_rows, context, float(context), k, 9, kinds, {}, {})


def test_growth_is_told_by_kind():
    rows = [made_up("context", 1, context, 1) for context in (128, 1024, 8192)]
    rows += [made_up("batch", num_rows, 128, 1) for num_rows in (1, 4, 16)]
    fits = {fit["kind"]: fit for fit in scaling.fits(rows)}
    assert fits[OWN]["per_1000_tokens"] == pytest.approx(1.0)
    assert fits[OWN]["constant"] == pytest.approx(0.0, abs=1e-9)
    assert fits[OURS]["growth"] == pytest.approx(0.0)
    assert fits[OWN]["growth"] == pytest.approx(0.001 * (8192 - 128) / rows[0].sums[WHOLE])
    assert fits[WHOLE]["batch_exponent"] == pytest.approx(0.5)


def test_exponents_of_the_window():
    rows = [made_up("context", 1, 0, k)._replace(sums={WHOLE: 3.0 * (k + 1) ** 0.75}) for k in (0, 1, 3)]
    assert scaling.window_exponents(rows)[0]["exponent"] == pytest.approx(0.75)


def test_kinds_are_the_whole():
    seconds = {"target forward": 5.0, "head: further drafts": 2.0, OWN: 1.0, HEADS: 0.5, "caches": 0.25, "acceptance": 0.125}
    found = scaling.sums(seconds)
    assert found == {WHOLE: 8.875, OWN: 1.0, HEADS: 0.5, OTHERS: 7.0, OURS: 0.375}


def test_every_k_has_its_turn_and_the_first_round_is_not_counted():
    schedule = Turns([0, 3, 1])
    assert schedule.turn == [(1, False), (1, True), (3, True), (0, True)]
    assert [schedule.next_length(None) for _ in range(6)] == [1, 1, 3, 0, 1, 1]
    assert schedule.choices == (0, 1, 3)
    assert Turns([0]).turn == [(0, False), (0, True)]


@pytest.mark.parametrize(
    ("mode", "places", "lengths"), [(EAGER, [Place(1, 8), Place(2, 40)], [0, 2]), (COMPILED, [Place(2, 8), Place(2, 40)], [2])]
)
def test_rounds_of_open_texts_take_turns(mode, places, lengths):
    decoder = scaling.made(tiny.decoder("mimo"), mode, "eager")
    rows = scaling.measure(decoder, mode, "context", places, SimpleNamespace(num_speculative_tokens=lengths, turns=2))
    found = [(row.num_rows, row.context, row.num_drafted, row.num_rounds) for row in rows]
    assert found == [(*place, k, 2) for place in places for k in lengths]
    for row in rows:
        assert set(row.sums) == set(scaling.KINDS[mode])
        assert row.context < row.length < row.context + 40
        assert row.spread["q1"] <= row.sums[WHOLE] <= row.spread["q3"]
        assert row.sums[OTHERS] < row.sums[WHOLE]
        assert row.sums[OURS] > 0
    if mode == EAGER:
        assert all(row.sums[OWN] > 0 for row in rows)
        assert [row.sums[HEADS] > 0 for row in rows] == [False, True, False, True], "the head attends where it drafts"


def test_the_script_from_end_to_end(tmp_path, capsys):
    folder = tiny.write_checkpoint(tmp_path / "checkpoint", tiny.target("mimo"), tiny.head("mimo"))
    few = ["--turns=1", "--modes", "eager", "--contexts", "16", "48", "--batches", "1", "2", "--num-speculative-tokens", "0", "2"]
    scaling.main([*few, "--dtype=float32", f"--checkpoint={folder}", f"--out={tmp_path}"])
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert len(result["rows"]) == 8
    assert {(fit["K"], fit["kind"]) for fit in result["fits"]} == {(k, kind) for k in (0, 2) for kind in scaling.KINDS[EAGER]}
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])) == {"eager K=0", "eager K=2"}
    assert (tmp_path / "scaling.png").exists() == bool(find_spec("matplotlib"))
