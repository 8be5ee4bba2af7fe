"""After any pattern of acceptance the states of a recurrent layer are those of reading each row's text alone.

A new kind of `mtpdecode.recurrent.KINDS` is held to this by a line in `MODELS`.
"""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from mtpdecode import CacheError, CropCache, RaggedCache, UnsupportedModelError
from mtpdecode import recurrent as module
from mtpdecode.cache import CacheLayout
from mtpdecode.layers import layer_plans, layer_windows
from mtpdecode.recurrent import LayerPlan, RecurrentLayer
from mtpdecode.target import decoder_of, forward
from tests import tiny
from tests.families.zoo import bailing_hybrid, glm5_next, nemotron_h, qwen3_5, qwen3_5_moe, qwen3_next, qwen4_exp
from tests.tiny import VOCAB

MODELS = {
    "qwen3_5": qwen3_5.build,
    "qwen3_5_moe": qwen3_5_moe.build,
    "qwen3_next": qwen3_next.build,
    "qwen4_exp": qwen4_exp.wrapped,
    "nemotron_h": nemotron_h.build,
    "glm5_next": glm5_next.build,
    "bailing_hybrid": bailing_hybrid.build,
}
if bailing_hybrid.BailingHybridConfig is None:  # transformers 5.17 has none
    del MODELS["bailing_hybrid"]
WIDTHS = (4, 1, 3, 70)
"""Tokens of the windows, in turn: a round, a round without a draft, and one that is longer than the chunks of chunked rules."""

SETTINGS = settings(max_examples=15, deadline=None, derandomize=True, database=None)
SHARES = st.lists(st.lists(st.sampled_from((0.0, 0.3, 0.7, 1.0)), min_size=3, max_size=3), min_size=1, max_size=6)
"""Per round, how much of the window each of 3 rows keeps."""

NAMES = pytest.mark.parametrize("name", MODELS)


@cache
def model_of(name):
    return MODELS[name]()


def manager_of(model, num_rows=3):
    config = model.config.get_text_config(decoder=True)
    plans = layer_plans(config, decoder_of(model).layers, "a test's model")
    layout = CacheLayout(layer_windows(config, "a test's model"), "sdpa", model.dtype, plans)
    manager = RaggedCache(layout, config.num_hidden_layers, num_rows, torch.device("cpu"))
    manager.reserve(600)
    return manager


@torch.no_grad()
def states_alone(model, tokens):
    """[(...)] the states of every recurrent layer behind a text that transformers read at once."""
    states = DynamicCache(config=model.config.get_text_config(decoder=True))
    model(tokens[None], **{tiny.CACHE: states}, use_cache=True)
    return [
        (f"layer {number}, {what} state {index}", state[0])
        for number, layer in enumerate(states.layers)
        if isinstance(layer, module.LinearAttentionCacheLayerMixin)
        for what, held in (("convolution", layer.conv_states), ("recurrent", layer.recurrent_states))
        for index, state in held.items()
        if state is not None
    ]


def states_of(manager, row):
    """The same of one row of a manager: what a window would be lent."""
    layers = [layer for layer in manager.window(1).cache.layers if isinstance(layer, RecurrentLayer)]
    held = [state for layer in layers for states in (layer.conv_states, layer.recurrent_states) for state in states.values()]
    return [state[row] for state in held if state is not None]


def walk(model, manager, texts, rounds, seed=0):
    """Feed windows, the kept tokens from each row's text and the others wild; commit; -> tokens kept per row."""
    generator, kept = torch.Generator().manual_seed(seed), [0] * len(texts)
    for number, shares in enumerate(rounds):
        width = WIDTHS[number % len(WIDTHS)]
        counts = [round(share * width) for share in shares]
        tokens = torch.randint(VOCAB, (len(texts), width), generator=generator)
        for row, count in enumerate(counts):
            tokens[row, :count] = texts[row][kept[row] : kept[row] + count]
        with torch.no_grad():
            forward(model, {"input_ids": tokens}, manager.window(width), 1, "post_norm")
            manager.commit(torch.tensor(counts))
        kept = [size + count for size, count in zip(kept, counts, strict=True)]
    return kept


def largest_error(model, manager, texts, kept):
    """(error, where) the worst state of all rows and layers, where a state is large in proportion to it."""
    worst = (0.0, "nowhere")
    for row, length in enumerate(kept):
        if length:
            pairs = zip(states_of(manager, row), states_alone(model, texts[row, :length]), strict=True)
            for one, (where, other) in pairs:
                error = float(((one - other).abs() / other.abs().max().clamp(min=1)).nan_to_num(nan=torch.inf).max())
                worst = max(worst, (error, f"row {row}, {where}"))
    return worst


def texts_for(num_rows=3):
    return torch.randint(VOCAB, (num_rows, 400), generator=torch.Generator().manual_seed(1))


@NAMES
@SETTINGS
@given(rounds=SHARES)
def test_states_after_commits_are_those_of_each_row_alone(name, rounds):
    model, manager, texts = model_of(name), manager_of(model_of(name)), texts_for()
    kept = walk(model, manager, texts, rounds)
    assert manager.lengths.tolist() == kept
    error, where = largest_error(model, manager, texts, kept)
    assert error < 1e-5, f"{where} is off by {error:.1e}"


ROUNDS = [[0.7, 0.3, 1.0], [1.0, 0.0, 1.0], [0.7, 0.3, 0.0], [0.3, 0.7, 1.0], [0.7, 1.0, 0.3]]


@NAMES
def test_the_mixers_own_forward_comes_to_the_same(name, monkeypatch):
    """The slower replay, for recurrences that no short loop describes."""
    monkeypatch.setattr(module, "KINDS", tuple(kind._replace(terms=None) for kind in module.KINDS))
    model, texts = model_of(name), texts_for()
    manager = manager_of(model)
    error, where = largest_error(model, manager, texts, walk(model, manager, texts, ROUNDS))
    assert error < 1e-5, f"{where} is off by {error:.1e}"


# ── faults that the sentence above must see ─────────────────────────────────────────────────────────────────────────────────


def nothing_refused(monkeypatch):
    applied = module.Terms.applied
    monkeypatch.setattr(module.Terms, "applied", lambda self, state, counts: applied(self, state, counts * 0 + 99))


def one_too_many(monkeypatch):
    applied = module.Terms.applied
    monkeypatch.setattr(module.Terms, "applied", lambda self, state, counts: applied(self, state, counts + 1))


def no_decay(monkeypatch):
    applied = module.Terms.applied
    monkeypatch.setattr(module.Terms, "applied", lambda self, *rest: applied(self._replace(decays=self.decays**0), *rest))


def other_rows(monkeypatch):
    replayed = RecurrentLayer._replayed
    monkeypatch.setattr(RecurrentLayer, "_replayed", lambda self, rows, length: replayed(self, (rows + 1) % 3, length))


def the_windows_end(monkeypatch):
    monkeypatch.setattr(RecurrentLayer, "_kept", lambda self, counts, state, end: end)


def a_late_convolution(monkeypatch):
    taken = module._taken
    monkeypatch.setattr(module, "_taken", lambda tape, starts, size: taken(tape, (starts - 1).clamp(min=0), size))


FAULTS = (nothing_refused, one_too_many, no_decay, other_rows, the_windows_end, a_late_convolution)


@pytest.mark.parametrize("name", ["qwen3_5", "nemotron_h", "glm5_next"])
@pytest.mark.parametrize("plant", FAULTS)
def test_a_planted_fault_is_seen(plant, name, monkeypatch):
    """In every kind of recurrence: gated delta networks, Mamba-2, Kimi delta attention."""
    plant(monkeypatch)
    model, texts = model_of(name), texts_for()
    manager = manager_of(model)
    kept = walk(model, manager, texts, ROUNDS)
    error, _ = largest_error(model, manager, texts, kept)
    assert not error < 1e-3, f"{plant.__name__}: off by {error:.1e} only, so nobody would see it"


# ── windows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_window_that_nobody_commits_leaves_no_trace():
    model, texts = model_of("qwen3_5"), texts_for()
    manager = manager_of(model)
    kept = walk(model, manager, texts, ROUNDS[:2])
    for width in (1, 4):
        with torch.no_grad():
            forward(model, {"input_ids": texts[:, :width]}, manager.window(width), 1, "post_norm")
    error, where = largest_error(model, manager, texts, kept)
    assert error < 1e-5, f"{where} is off by {error:.1e}"


def test_the_drawing_of_the_tape():
    """tape c c c | w w w w, starts 0; commit 2: the next window sees c w w; and windows behind what nobody committed yet."""
    layer = RecurrentLayer(LayerPlan("conv", keys=False, num_states=1))
    c, w, n = 1.0, 2.0, 3.0

    def put(num_tokens, value, offset=None):
        layer.open(num_tokens, offset)
        return layer.update_conv_state(torch.full((2, 1, num_tokens), value), conv_kernel_size=3)[:, 0].tolist()

    assert put(3, c) == [[0, 0, 0, c, c, c]] * 2, "nothing stands before the first token"
    layer.commit(torch.tensor([3, 3]))
    assert put(4, w) == [[c, c, c, w, w, w, w]] * 2
    assert put(1, n, torch.tensor([1, 4])) == [[c, c, w, n], [w, w, w, n]], "behind tokens that are not committed"
    assert put(1, n, torch.tensor([2, 4])) == [[c, w, n, n], [w, w, w, n]], "and one of them is now another"
    layer.commit(torch.tensor([2, 0]))
    assert put(1, n) == [[c, w, n, n], [c, c, c, n]]


def test_a_model_that_writes_into_its_loan():
    """Single tokens reach some mixers' states in place: the committed state stays, until the token is committed."""
    mixer = qwen3_5.build().model.layers[0].linear_attn
    layer = RecurrentLayer(LayerPlan("linear", keys=False, num_states=1, mixer=mixer))
    for value, state in ((1.0, 2.0), (2.0, 3.0)):
        layer.open(1)
        layer.update_conv_state(torch.tensor([[[value]]]), conv_kernel_size=2)
        layer.update_recurrent_state(torch.tensor([[state]]))
        layer.commit(torch.tensor([1]))
    for counts, state, context in ((0, 3.0, [1.0, 2.0]), (1, 4.0, [2.0, 5.0])):
        layer.open(1)
        assert layer.recurrent_states[0].tolist() == [[3.0]]
        layer._recorded["x"] = torch.zeros(1)  # the mixer's projections were heard, so it ran
        layer.recurrent_states[0] += 1
        layer.conv_states[0].copy_(torch.tensor([[[2.0, 5.0]]]))
        layer.commit(torch.tensor([counts]))
        layer.open(1)
        assert layer.recurrent_states[0].tolist() == [[state]]
        assert layer.conv_states[0][0, 0].tolist() == context


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_mixer_nobody_has_shown_to_be_exact_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("mtpdecode.layers.kind_of", lambda _: None)
    with pytest.raises(UnsupportedModelError, match=r"linear_attention layers .* Qwen3_5GatedDeltaNet.*known to be exact"):
        manager_of(model_of("qwen3_5"))


def test_states_cannot_be_cropped():
    layout = manager_of(model_of("qwen3_5")).layout
    with pytest.raises(CacheError, match=r"layers of type linear_attention; a state cannot be cropped"):
        CropCache(layout, 3, 1, torch.device("cpu"))
