"""Rounds whose kernels were recorded and are launched together give the text of plain rounds: on a GPU, and with a tape on a CPU.

The tape does what a CUDA graph does: what was recorded runs again on the same tensors, into the same tensors, and nothing else
does, no Python and no read by the host. So what would read from the wrong place on a GPU does so here.
"""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtpdecode import MTPDecoder, NGramProposer
from mtpdecode.captured import RECORDS
from mtpdecode.compiled import CompiledRound
from mtpdecode.families import FAMILIES
from tests import tiny
from tests.families import gemma4
from tests.families.zoo import nemotron_h, qwen3_5

LENGTH = 44
"""Longer than a step of slots: the caches grow on the way, and another recording is made."""
RULES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 9},
    "block": {"do_sample": True, "acceptance": "block"},
    "coupled": {"do_sample": True, "acceptance": "coupled"},
    "penalty": {"do_sample": False, "repetition_penalty": 1.4, "min_new_tokens": 6},
}


class Tape(TorchDispatchMode):
    """Every operator that is called in here, with the tensors that it was given and what it returned.

    made, played  how many there were, and how often any was launched
    """

    made = played = 0

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host reads a number\nwhile kernels are recorded")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def play(self):
        Tape.played += 1
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


def on_tape(function, device):
    """Runs while it records, as a GPU does not; what is not put right by the launch would show."""
    with Tape() as tape:
        result = function()
    Tape.made += 1
    return result, tape.play


@pytest.fixture(autouse=True)
def _tape(monkeypatch):
    monkeypatch.setitem(RECORDS, "cpu", on_tape)
    monkeypatch.setattr("mtpdecode.compiled._KINDS", weakref.WeakKeyDictionary())  # a kind that could not be recorded gives up
    Tape.made = Tape.played = 0
    torch._dynamo.reset()


def assert_the_same(made, num_rows=3, length=LENGTH, num_calls=2, **options):
    """made: makes a decoder. Text, what every round kept, and what caches hold: as with rounds that are not compiled."""
    plain, captured = made(), made()
    captured.step = CompiledRound("eager")
    batch, settings = tiny.padded(tiny.prompts()[:num_rows]), {"max_new_tokens": length, "seed": 3} | options
    for _ in range(num_calls):
        texts = [decoder.generate(**batch, **settings) for decoder in (plain, captured)]
        assert torch.equal(*texts)
        assert captured.metrics.history == plain.metrics.history, "drafts are those of plain rounds too"
        assert torch.equal(captured.cache.lengths, plain.cache.lengths)
    assert Tape.made > 1
    assert Tape.played > plain.metrics.num_rounds / 2, "most rounds were launched"


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sliding", "deepseek_v3"))])
@pytest.mark.parametrize("schedule", [0, 2, tiny.Turns()], ids=["K=0", "K=2", "turns"])
def test_greedy_text(name, schedule):
    target, head = tiny.target(name), tiny.head(name)
    assert_the_same(lambda: MTPDecoder.from_model(target, head=head, num_speculative_tokens=schedule), **RULES["greedy"])


@pytest.mark.parametrize("rule", list(RULES)[1:])
def test_other_rules(rule):
    assert_the_same(lambda: tiny.decoder("llama", 2), num_calls=1, **RULES[rule])


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"lookup": NGramProposer(3)}, {"draft_vocabulary": 20}])
def test_other_drafters(options):
    assert_the_same(lambda: tiny.decoder("llama", 2, **options), num_calls=1, **RULES["greedy"])


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["greedy", "sampled"])
@pytest.mark.parametrize("family", ["qwen3_5", "nemotron_h"])
def test_recurrent_states(family, rule):
    """What a window leaves goes by its size, so that rounds behind another K are other recordings."""
    model = (qwen3_5 if family == "qwen3_5" else nemotron_h).build()
    head = tiny.build_head(model, next(row for row in FAMILIES if row.family == family))
    assert_the_same(
        lambda: MTPDecoder.from_model(model, head=head, num_speculative_tokens=tiny.Turns()), length=70, **RULES[rule]
    )


@pytest.mark.slow
def test_assistants(tmp_path):
    folder = gemma4.write(tmp_path / "assistant", "e2b")
    assert_the_same(
        lambda: MTPDecoder.from_model(gemma4.target("e2b"), assistant=folder, num_speculative_tokens=2), **RULES["greedy"]
    )


def captured(name="llama", **options):
    decoder = tiny.decoder(name, 2, **options)
    decoder.step = CompiledRound("eager")
    return decoder


@pytest.mark.slow
def test_texts_that_take_turns_keep_to_their_own_places():
    decoder, ids = captured(), torch.tensor([tiny.prompts()[0]])
    settings = [{"do_sample": False}, {"do_sample": True, "seed": 3}, {"do_sample": False, "num_speculative_tokens": 1}]
    alone = [list(tiny.decoder("llama", 2).stream(ids, max_new_tokens=24, **each)) for each in settings]
    assert tiny.streamed_in_turns(decoder, ids, settings, max_new_tokens=24) == alone
    assert Tape.played


def test_what_is_handed_on_stays_as_it_is():
    """The head may learn plain rounds much later, from states that many rounds left."""
    decoder, seen = captured(), []
    step = decoder.step

    def keeping(*args):
        state, told = step(*args)
        seen.append([(tensor, tensor.clone()) for tensor in (*state.fresh, state.text.lengths, state.done, told)])
        return state, told

    decoder.step = keeping
    decoder.generate(tiny.one(tiny.prompts()[0]), max_new_tokens=20, do_sample=False)
    assert Tape.played
    assert all(torch.equal(tensor, then) for kept in seen for tensor, then in kept)


def test_what_cannot_be_recorded_is_launched_one_by_one(monkeypatch):
    def failing(function, device):
        function()
        raise RuntimeError("operation not permitted\nwhile recording")

    monkeypatch.setitem(RECORDS, "cpu", failing)
    decoder, row = captured(), tiny.prompts()[0]
    with pytest.warns(UserWarning, match=r"cannot be recorded on cpu \(operation not permitted\).*one by one") as caught:
        found = decoder.generate(tiny.one(row), max_new_tokens=LENGTH, do_sample=False)
    assert len(caught) == 1
    assert found[0].tolist() == [*row, *tiny.plain("llama", row, max_new_tokens=LENGTH)]


def test_nothing_is_recorded_where_nobody_asked():
    decoder = tiny.decoder("llama", 2)
    decoder.step = CompiledRound("eager", is_captured=False)
    decoder.generate(tiny.one(tiny.prompts()[0]), max_new_tokens=20, do_sample=False)
    assert not Tape.made


def test_a_recording_keeps_no_cache_alive(monkeypatch):
    """A tape holds what it was given, which a CUDA graph does not. This one holds nothing, and its launches do nothing."""
    launched = []
    monkeypatch.setitem(RECORDS, "cpu", lambda function, device: (function(), lambda: launched.append(1)))
    decoder = captured()
    rounds = decoder.stream(tiny.one(tiny.prompts()[0]), max_new_tokens=40, do_sample=False)
    for _ in range(8):
        next(rounds)
    rounds.close()
    assert launched
    cache = weakref.ref(decoder.cache)
    decoder.release()
    del rounds
    gc.collect()
    assert cache() is None


@pytest.mark.parametrize("fault", ["places", "cells", "left"])
def test_the_tape_shows_what_goes_wrong(monkeypatch, fault):
    """Or the tests above would prove nothing."""
    if fault == "places":  # the first round again and again
        monkeypatch.setattr(torch, "_foreach_copy_", lambda places, tensors: None)
    elif fault == "cells":  # lengths that nobody moves
        monkeypatch.setattr("mtpdecode.cache.RaggedCache.moving", lambda self: [(vars(self._slots), "written")])
    else:  # caches hold what they held
        monkeypatch.setattr("mtpdecode.captured._fill", lambda cells, tensors: None)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        assert_the_same(lambda: tiny.decoder("llama", 2), num_calls=1, **RULES["greedy"])
