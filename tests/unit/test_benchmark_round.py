"""`benchmarks.round`: parts add up, the marks in a graph change nothing and stand where they should, bytes are those by hand."""

import json
import time

import pytest
import torch

from benchmarks import common, roofline, round, timers
from benchmarks.timers import FORWARDS, HOST, IN_GRAPH, MARKING, REST, TARGET, Stopwatch
from mtpdecode import MTPDecoder
from mtpdecode.compiled import CompiledRound
from tests import tiny

EAGER_PARTS = {*timers.PARTS} - {IN_GRAPH, MARKING}


@pytest.fixture(autouse=True)
def _no_graphs_of_others():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def checkpoint(tmp_path):
    return tiny.write_checkpoint(tmp_path / "checkpoint", tiny.target("mimo"), tiny.head("mimo"))


# ── the stopwatch ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_inner_parts_are_taken_out_of_outer_ones_and_add_up():
    watch = Stopwatch()
    inner = watch.around(lambda: "inner", lambda: time.sleep(0.3))
    outer = watch.around(lambda: "outer", lambda: (time.sleep(0.1), inner()))
    watch.start("rest")
    start = time.perf_counter()
    outer()
    whole = time.perf_counter() - start
    seconds = watch.stop()
    assert 0.1 <= seconds["outer"] < 0.3 <= seconds["inner"]
    assert abs(sum(seconds.values()) - whole) < 0.02, "a part counted twice would be off by its own 0.3 s or 0.1 s"


def test_a_watch_that_stands_still_counts_nothing():
    watch = Stopwatch()
    timed = watch.around(lambda: "part", lambda: 5)
    assert timed() == 5
    assert not watch.seconds
    watch.start("rest")
    assert set(watch.stop()) == {"rest"}
    timed()
    assert set(watch.seconds) == {"rest"}


def test_what_is_charged_is_in_no_open_part_and_in_no_share():
    watch = Stopwatch()
    watch.start(REST)
    watch.enter(TARGET)
    time.sleep(0.2)
    watch.charge(MARKING)
    watch.leave()
    seconds = watch.stop()
    assert seconds[MARKING] >= 0.2 > seconds[TARGET] + seconds[REST]
    parts = {TARGET: 9.0, REST: 1.0, MARKING: 30.0}
    row = round.Row("compiled K=1", "text", 0, num_rounds=1, tau=1.0, committed=1.0, ms=10.0, parts=parts)
    assert row.outside == pytest.approx(0.1)


# ── parts of rounds ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def timed_rounds(decoder, timer, **options):
    watch, inputs = Stopwatch(), tiny.padded(tiny.prompts())
    with timer(decoder, watch, **options):
        return timers.rounds(decoder, watch, inputs, max_new_tokens=12, do_sample=False, num_speculative_tokens=2)


def test_every_part_of_an_eager_round_is_seen_and_nothing_stays_patched():
    decoder = tiny.decoder("llama")
    for each in timed_rounds(decoder, timers.watching):
        assert set(each) == EAGER_PARTS
        assert all(seconds > 0 for seconds in each.values())
    assert "step" in vars(decoder)
    assert not {"forward", "logits"} & (vars(decoder.target).keys() | vars(decoder.head).keys())


def test_a_slow_target_is_seen_as_that_and_parts_are_the_whole():
    decoder = MTPDecoder.from_model(tiny.build("llama"), head=tiny.head("llama"), num_speculative_tokens=2)
    handle = decoder.target.model.norm.register_forward_hook(lambda *_: time.sleep(0.05))
    start = time.perf_counter()
    found = timed_rounds(decoder, timers.watching)
    whole = time.perf_counter() - start
    handle.remove()
    assert all(each[timers.TARGET] >= 0.05 for each in found)
    others = [sum(each.values()) - each[timers.TARGET] for each in found]
    assert min(others) < 0.05, "the wait belongs to the target alone"
    assert sum(sum(each.values()) for each in found) < whole - 0.05, "the first round, and the prompt, are left out"


def test_attention_is_taken_out_of_target_and_head():
    decoder = tiny.decoder("llama")
    for each in timed_rounds(decoder, timers.watching, attention=True):
        assert set(each) == {*EAGER_PARTS, *timers.ATTENTION.values()}


def test_marks_in_a_graph_tell_forwards_from_the_rest_and_change_nothing():
    decoder = MTPDecoder.from_model(tiny.target("llama"), head=tiny.head("llama"), num_speculative_tokens=2)
    batch = {**tiny.padded(tiny.prompts()), "max_new_tokens": 12, "do_sample": False}
    expected = decoder.generate(**batch)
    decoder.step = CompiledRound("eager")
    for each in timed_rounds(decoder, timers.marking):
        assert set(each) == {*FORWARDS, IN_GRAPH, REST, HOST, MARKING}
        assert all(seconds > 0 for seconds in each.values())
    made = round.num_graphs()
    with timers.marking(decoder, Stopwatch()):
        assert torch.equal(decoder.generate(**batch), expected)
    assert round.num_graphs() == made, "the patches are the same objects, so the graph is the same"


def test_the_compiler_keeps_marks_in_order():
    """What a mark is added to waits for it, and what it is given comes first."""
    watch, order = Stopwatch(), []
    watch.enter, watch.leave = order.append, lambda: order.append("-")
    timers._MARKED[0] = watch

    def function(x):
        (y,) = timers._marked([x], 1)
        (z,) = timers._marked([y.sin()], timers.LEAVE)
        (u,) = timers._marked([z.cos()], 0)
        return timers._marked([u], timers.LEAVE)[0], z

    found = torch.compile(function, backend="aot_eager", fullgraph=True)(torch.ones(3))
    assert order == [FORWARDS[1], "-", FORWARDS[0], "-"]
    assert torch.equal(found[0], torch.ones(3).sin().cos())


# ── bytes ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bytes_of_a_round_by_hand():
    """llama of tests/tiny.py: D = 32, 2 layers, 4 query heads and 2 key-value heads of 8, MLP 64, V = 48, float32."""
    decoder = tiny.decoder("llama")
    decoder.generate(**tiny.padded(tiny.prompts(1)), max_new_tokens=6, do_sample=False)
    layer = (32 * 32 + 2 * 32 * 16 + 32 * 32) + 3 * 32 * 64 + 2 * 32  # q, k and v, o; gate, up, down; norms
    assert roofline.round_bytes(decoder, 3, num_committed=10) == {
        "target: weights": 4 * (2 * layer + 32 + 48 * 32),  # the last norm, the output layer; no embedding
        "target: keys and values": 4 * 10 * 2 * (2 * 2 * 8),
        "head: weights": 4 * 3 * (layer + 2 * 32 * 32 + head_norms(decoder.head) * 32),
        "head: vocabulary": 4 * 3 * 48 * 32,
        "head: keys and values": 4 * 3 * 10 * (2 * 2 * 8),
    }


def head_norms(head):
    return 3 if head.spec.norm_out == "own" else 2


def test_a_draft_vocabulary_and_tied_weights_count_once():
    model = tiny.target("llama")
    whole = roofline.target_bytes(model)
    tied = tiny.build("llama", tie_word_embeddings=True)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert roofline.target_bytes(tied) == whole
    decoder = MTPDecoder.from_model(model, head=tiny.head("llama"), draft_vocabulary=torch.arange(3, 15))
    decoder.generate(**tiny.padded(tiny.prompts(1)), max_new_tokens=6, do_sample=False)
    assert roofline.round_bytes(decoder, 1, 10)["head: vocabulary"] == 4 * 12 * 32


def test_bandwidth_is_bytes_over_seconds():
    speed = roofline.bandwidth((lambda: time.sleep(0.1), 10**6), torch.device("cpu"))
    assert 5e6 < speed < 1e7
    for name, (function, num_bytes) in roofline.readers(2**20, torch.device("cpu")).items():
        function()
        assert num_bytes == 2**20, name


# ── end to end ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_script_from_end_to_end(checkpoint, tmp_path, capsys):
    few = ["--num-per-kind=1", "--repeats=1", "--max-new-tokens=12", "--megabytes=1", "--num-speculative-tokens=2"]
    round.main([*few, "--dtype=float32", "--backend=eager", f"--checkpoint={checkpoint}", f"--out={tmp_path}"])
    result = json.loads((tmp_path / "round.json").read_text())
    assert [(cell["mode"], cell["K"]) for cell in result["cells"]] == [("eager", 2), ("compiled", 2)]
    assert result["graphs"]["while_measuring"] == 0
    for row in result["rows"]:
        assert set(row["parts"]) == EAGER_PARTS if row["cell"].startswith("eager") else {*FORWARDS, IN_GRAPH, REST, HOST, MARKING}
    for cell in result["cells"]:
        assert 0 < cell["outside"]["median"] < 1
        assert cell["ms"]["q1"] <= cell["ms"]["median"] <= cell["ms"]["q3"]
        assert cell["floor_ms"] == pytest.approx(1000 * sum(cell["bytes"].values()) / fastest(result), abs=1e-3)
    printed = capsys.readouterr().out
    assert "outside of the forwards, %" in printed
    assert set(json.loads(printed.splitlines()[-1])) == {"eager K=2", "compiled K=2"}


def fastest(result):
    return max(speed["median"] for speed in result["bandwidth"].values())


def test_prompts_of_a_checkpoint_are_random_and_the_same_every_time():
    first, second = (common.random_prompt(tiny.target("llama"), "chat", 8, seed) for seed in (0, 1))
    assert first == common.random_prompt(tiny.target("llama"), "chat", 8)
    assert first.ids != second.ids
    assert all(0 <= token < tiny.VOCAB for token in first.ids)
