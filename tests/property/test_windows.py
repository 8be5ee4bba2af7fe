"""After any pattern of acceptance, a window says what the model says of each row's text alone.

For caches that hold more than keys and values: blocks of tokens compressed into one key, tokens picked by pooled keys, n-grams.
"""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpdecode import RaggedCache
from mtpdecode.cache import CacheLayout, _CompressedLayer
from mtpdecode.layers import check_attention, layer_plans, layer_windows
from mtpdecode.target import decoder_of, forward, text_config
from tests.families.zoo import deepseek_v4, qwen4_exp
from tests.tiny import VOCAB

MODELS = {"deepseek_v4": deepseek_v4.build, "qwen4_exp": qwen4_exp.wrapped}
WIDTHS = (5, 1, 3, 9, 1)
"""Tokens of the windows, in turn; single ones go another way through many models."""

SETTINGS = settings(max_examples=12, deadline=None, derandomize=True, database=None)
SHARES = st.lists(st.lists(st.sampled_from((0.0, 0.2, 0.6, 1.0)), min_size=3, max_size=3), min_size=3, max_size=8)
"""Per round, how much of the window each of 3 rows keeps."""

NAMES = pytest.mark.parametrize("name", MODELS)


@cache
def model_of(name):
    return MODELS[name]()


def manager_of(model, num_rows):
    config, name = text_config(model), type(model).__name__
    plans = layer_plans(config, decoder_of(model).layers, name)
    layout = CacheLayout(layer_windows(config, name), check_attention(config, name), model.dtype, plans)
    manager = RaggedCache(layout, config.num_hidden_layers, num_rows, torch.device("cpu"))
    manager.reserve(128)
    return manager


@torch.no_grad()
def largest_error(model, rounds):
    """Feed windows that begin with what each row keeps of its text and go on wildly -> how far off the kept ones' logits are."""
    texts = torch.randint(3, VOCAB, (3, 64), generator=torch.Generator().manual_seed(1))
    wanted, manager, worst = model(texts, use_cache=False).logits, manager_of(model, len(texts)), 0.0
    generator = torch.Generator().manual_seed(0)
    for number, shares in enumerate(rounds):
        width, lengths = WIDTHS[number % len(WIDTHS)], manager.lengths.tolist()
        counts = [round(share * width) for share in shares]
        tokens = torch.randint(3, VOCAB, (len(texts), width), generator=generator)
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            tokens[row, :count] = texts[row, length : length + count]
        found = forward(model, {"input_ids": tokens}, manager.window(width), width, "post_norm").logits
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            if count:
                worst = max(worst, float((found[row, :count] - wanted[row, length : length + count]).abs().max()))
        manager.commit(torch.tensor(counts))
    return worst


@NAMES
@SETTINGS
@given(rounds=SHARES)
def test_windows_after_commits_say_what_the_text_alone_does(name, rounds):
    error = largest_error(model_of(name), rounds)
    assert error < 1e-4, f"logits are off by {error:.1e}"


ROUNDS = [[0.2, 0.0, 1.0], [1.0, 1.0, 1.0], [0.8, 0.4, 0.0], [0.4, 0.8, 1.0], [1.0, 1.0, 0.0], [0.8, 0.8, 0.8], [1.0, 1.0, 1.0]]


def test_a_single_token_that_sees_blocks_too_early_is_noticed(monkeypatch):
    assert largest_error(model_of("deepseek_v4"), ROUNDS) < 1e-4
    monkeypatch.setattr(_CompressedLayer, "hooks", lambda self: [])
    assert largest_error(model_of("deepseek_v4"), ROUNDS) > 1e-2


def test_n_grams_that_begin_with_another_token_are_noticed(monkeypatch):
    assert largest_error(model_of("qwen4_exp"), ROUNDS) < 1e-4
    plans = tuple(plan._replace(blanks={}) for plan in manager_of(model_of("qwen4_exp"), 1).layout.plans)
    monkeypatch.setattr(f"{__name__}.layer_plans", lambda *_: plans)
    assert largest_error(model_of("qwen4_exp"), ROUNDS) > 1e-2
