"""Every family as compiled rounds: plain decoding's text from one graph and without a warning, or a warning that says why not.

What follows a model by hooks (recurrent layers, learned distances, shared indexers) is registered around a round, and only there.
"""

from functools import cache

import pytest
import torch

from mtpdecode import MTPDecoder, recurrent
from mtpdecode.compiled import CompiledRound
from mtpdecode.families import FAMILIES
from tests import tiny
from tests.families import gemma4
from tests.families.zoo import cases

QUICK = ("qwen3_5", "inkling-text")
"""Recurrent layers, learned distances and short convolutions: cases that a bare pytest runs."""

EAGER = {
    "longcat_flash": "for expert_idx_tensor in expert_hit",
    "step3p7": "for expert_idx in hit",
    "qwen4_exp": "if num_complete_blocks > 0",
    "qwen4_exp-vision-ngrams": "if num_complete_blocks > 0",
}
"""Cases that run without compilation, and the line of the model that the warning names: these loop over the experts that were
chosen, or over queries, each with as many blocks of keys as it sees."""

HOOKED = ("qwen3_5", "nemotron_h-moe", "inkling-text", "glm_moe_dsa-5.2", "deepseek_v4")
BY_NAME = {case.name: case for case in cases()}
LENGTHS = (6, 70)
"""Of texts, in this order: the longer one outgrows a bucket of slots on the way."""


@pytest.fixture(autouse=True)
def _no_graphs_of_others():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@cache
def built(name):
    """(target, head) of a case."""
    case = BY_NAME[name]
    if case.skip:
        pytest.skip(case.skip)
    model = case.build()
    row = next(row for row in FAMILIES if row.family == case.family)
    return model, tiny.build_head(model, row, case.num_layers)


def decoder(name, num_speculative_tokens=2, is_compiled=True):
    model, head = built(name)
    made = MTPDecoder.from_model(model, head=head, num_speculative_tokens=num_speculative_tokens)
    if is_compiled:
        made.step = CompiledRound("aot_eager")
    return made


def assert_plain_text(made, length, what):
    rows = tiny.prompts(3)
    found = made.generate(**tiny.padded(rows), max_new_tokens=length, do_sample=False)
    expected = [tiny.alone(made.target, row, max_new_tokens=length) for row in rows]
    tiny.assert_rows(found, max(map(len, rows)), expected, what)


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def marked(name):
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in BY_NAME if name not in EAGER])
def test_one_graph_and_no_warning(name):
    made = decoder(name)
    for length in LENGTHS:
        assert_plain_text(made, length, f"{name}, compiled, {length} tokens")
        assert num_graphs() == 1, f"{num_graphs()} graphs after texts of {length} tokens"


@pytest.mark.slow
@pytest.mark.parametrize("name", gemma4.NAMES)
def test_assistants(name, tmp_path):
    assistant = gemma4.write(tmp_path / "assistant", name)
    made = MTPDecoder.from_model(gemma4.target(name), assistant=assistant, num_speculative_tokens=2)
    made.step = CompiledRound("aot_eager")
    for length in LENGTHS:
        assert_plain_text(made, length, f"{name}, compiled, {length} tokens")
        assert num_graphs() == 1, f"{num_graphs()} graphs after texts of {length} tokens"


@pytest.mark.slow
@pytest.mark.parametrize("name", EAGER)
def test_what_cannot_be_one_graph_is_said(name):
    made = decoder(name)
    with pytest.warns(UserWarning, match=r"runs as without compiled=True") as caught:
        assert_plain_text(made, LENGTHS[0], name)
    assert EAGER[name] in str(caught[0].message)
    assert len(caught) == 1
    assert num_graphs() == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", HOOKED)
def test_a_graph_for_each_k(name):
    """Single tokens, which some mixers write into the state they were lent; then windows, whose tapes have other lengths."""
    made = decoder(name)
    for count, k in enumerate((0, 1, 3), 1):
        made.options = made.options.replaced({"num_speculative_tokens": k})
        assert_plain_text(made, 12, f"{name}, K = {k}")
        assert num_graphs() == count, f"{num_graphs()} graphs; K = {k} is number {count}"


def test_a_replay_that_asks_the_host_is_not_compiled(monkeypatch):
    """Windows that are too long to be replayed token by token, and kinds of which nobody wrote down the terms."""
    with pytest.warns(UserWarning, match=r"Qwen3_5GatedDeltaNet over 18 tokens, more than 16, asks the host"):
        assert_plain_text(decoder("qwen3_5", 17), 6, "K = 17")
    monkeypatch.setattr(recurrent, "KINDS", tuple(kind._replace(terms=None) for kind in recurrent.KINDS))
    with pytest.warns(UserWarning, match=r"the replay of Qwen3_5GatedDeltaNet asks the host"):
        assert_plain_text(decoder("qwen3_5", 2), 6, "no terms")
    assert num_graphs() == 0


# ── hooks live as long as a round ───────────────────────────────────────────────────────────────────────────────────────────


def hooks(*modules):
    """Every hook on modules and what they are made of, and the limits of time steps, which are lifted with them."""
    parts = [part for module in modules for part in module.modules()]
    counts = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts]
    return sum(counts), [part.time_step_limit for part in parts if "time_step_limit" in vars(part)]


@pytest.mark.parametrize("name", HOOKED)
def test_no_hook_stays_while_a_stream_waits(name):
    """Two decoders in turn on one model and head, a stream that is given up, and an exception in the midst of a round."""
    first, second, (model, head) = decoder(name, 2, False), decoder(name, 1, False), built(name)
    before, (row, other, _) = hooks(model, head), tiny.prompts(3, lengths=(9, 5, 4))
    streams = [each.stream(tiny.one(text), max_new_tokens=12, do_sample=False) for each, text in ((first, row), (second, other))]
    texts = [[], []]
    for chunks in zip(*streams, strict=False):
        for text, chunk in zip(texts, chunks, strict=True):
            text += chunk.tokens[0]
        assert hooks(model, head) == before, "a hook stays while a stream waits"
    for text, prompt in zip(texts, (row, other), strict=True):
        assert text == tiny.alone(model, prompt, max_new_tokens=12)[: len(text)], "the other stream disturbed this one"

    def fail(*_):
        assert hooks(model, head)[0] > before[0] + 1, (
            "besides this one a round is followed by hooks, else this test shows nothing"
        )
        raise KeyboardInterrupt

    handle = model.get_output_embeddings().register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        first.generate(tiny.one(row), max_new_tokens=4, do_sample=False)
    handle.remove()
    assert hooks(model, head) == before, "a hook stays after an exception"
