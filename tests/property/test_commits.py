"""After any pattern of acceptance a cache holds what a fresh reading of the text would put there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from mtpdecode import CropCache, MTPDecoder, RaggedCache
from mtpdecode.cache import CacheLayout
from mtpdecode.layers import layer_windows
from mtpdecode.state import Window
from mtpdecode.target import forward
from tests import tiny
from tests.tiny import VOCAB, build, build_head, padded, prompts, row_of

SETTINGS = settings(max_examples=20, deadline=None, derandomize=True, database=None)
NAMES = ("llama", "sliding", "mistral", "deepseek_v3")
MODELS = {name: build(name) for name in NAMES}

ROUNDS = st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=8)
"""Per round, how many of 4 written tokens each of 3 rows keeps."""


def layout_of(model):
    return CacheLayout(layer_windows(model.config, "a test's model"), "sdpa", model.dtype)


def keys_and_values(cache, row, length):
    """[(H, length, D)] of every layer: what a row's committed slots hold."""
    return [part[row, :, :length] for layer in cache.layers for part in (layer.keys, layer.values)]


@torch.no_grad()
def fresh(model, tokens):
    """Keys and values of a text that was read at once, by transformers alone."""
    cache = DynamicCache()
    model(torch.tensor([tokens]), **{tiny.CACHE: cache}, use_cache=True)
    return keys_and_values(cache, 0, len(tokens))


def assert_equal(found, wanted, what):
    for layer, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.shape == other.shape, f"{what}: tensor {layer} has {one.shape[1]} slots, and {other.shape[1]} tokens were kept"
        difference = float((one - other).abs().max()) if one.numel() else 0.0
        assert difference < 1e-5, f"{what}: tensor {layer} is off by {difference}"


def committed(manager, model, rows, rounds):
    """Feed windows of 4 tokens, the kept ones from the row's text and the others wild; commit; -> tokens kept per row."""
    generator, kept = torch.Generator().manual_seed(0), [0] * len(rows)
    manager.reserve(4 * len(rounds) + 8)
    for counts in rounds:
        tokens = torch.randint(VOCAB, (len(rows), 4), generator=generator)
        for row, count in enumerate(counts):
            tokens[row, :count] = rows[row][kept[row] : kept[row] + count]
        with torch.no_grad():
            forward(model, {"input_ids": tokens}, manager.window(4), 1, "post_norm")
        manager.commit(torch.tensor(counts))
        kept = [size + count for size, count in zip(kept, counts, strict=True)]
    return kept


@pytest.mark.parametrize("name", NAMES)
@SETTINGS
@given(rounds=ROUNDS)
def test_ragged_cache_after_commits_is_a_fresh_prefill(name, rounds):
    """Three rows that keep 0 to 4 of 4 tokens each round hold the keys and values of their texts, and no others."""
    model, rows = MODELS[name], torch.randint(VOCAB, (3, 32), generator=torch.Generator().manual_seed(1))
    manager = RaggedCache(layout_of(model), model.config.num_hidden_layers, 3, torch.device("cpu"))
    kept = committed(manager, model, rows, rounds)
    assert manager.lengths.tolist() == kept
    for row, length in enumerate(kept):
        if length:
            found = keys_and_values(manager.window(1).cache, row, length)
            assert_equal(found, fresh(model, rows[row, :length].tolist()), f"row {row}")


@pytest.mark.parametrize("name", NAMES)
@SETTINGS
@given(rounds=ROUNDS)
def test_crop_cache_after_commits_is_a_fresh_prefill(name, rounds):
    """The slow twin, one row: cropped before the next window, it holds the text and no more."""
    model, rows = MODELS[name], torch.randint(VOCAB, (1, 32), generator=torch.Generator().manual_seed(1))
    manager = CropCache(layout_of(model), model.config.num_hidden_layers, 1, torch.device("cpu"))
    kept = committed(manager, model, rows, [counts[:1] for counts in rounds])
    cache = manager.window(1).cache
    assert manager.lengths.tolist() == kept
    if kept[0]:
        assert_equal(keys_and_values(cache, 0, kept[0]), fresh(model, rows[0, : kept[0]].tolist()), "the row")


# ── both caches behind a whole call ─────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def head_entries(decoder, tokens, depth):
    """Keys and values of one depth of the head, read at once: entry t pairs the target's state at t with token t + 1."""
    model, head = decoder.target, decoder.head
    cache, size = DynamicCache(), len(tokens) - 1
    ids = torch.tensor([tokens + [0] * depth])
    hidden = model(ids[:, :size], output_hidden_states=True).hidden_states[-1]
    positions = torch.arange(size)[None]
    window = Window(positions, layout_of(model).mask(positions, size), cache)
    for level in range(depth + 1):
        _, hidden = head(level, head.embed(ids[:, level + 1 : level + 1 + size]), hidden, window)
    layer = cache.layers[depth]
    return [layer.keys[0], layer.values[0]]


def assert_caches_hold(decoder, head_cache, row, tokens):
    """The target's cache holds all but the last token; the head's is behind by what it has not absorbed."""
    length, absorbed = int(decoder.cache.lengths[row]), int(head_cache.lengths[row])
    assert length == len(tokens) - 1
    assert 0 <= absorbed <= length
    assert_equal(keys_and_values(decoder.cache.window(1).cache, row, length), fresh(decoder.target, tokens[:-1]), f"row {row}")
    if not absorbed:
        return
    cache = head_cache.window(1).cache
    for depth in range(decoder.head.num_layers):
        layer = cache.layers[depth]
        found = [part[row, :, :absorbed] for part in (layer.keys, layer.values)]
        wanted = [part[:, :absorbed] for part in head_entries(decoder, tokens, depth)]
        assert_equal(found, wanted, f"row {row}, depth {depth} of the head")


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_caches_hold_exactly_the_text(name, options, num_layers):
    """After a call with rows of all lengths, of which some end early, target and head hold every row's text."""
    model, rows, made = MODELS[name], prompts(), []

    def recorded(*args):
        made.append(RaggedCache(*args))
        return made[-1]

    head = build_head(model, row_of(name), num_layers)
    decoder = MTPDecoder.from_model(model, head=head, num_speculative_tokens=3, cache=recorded)
    batch = padded(rows)
    out = decoder.generate(**batch, max_new_tokens=24, prefill_chunk_size=3, **options)[:, batch["input_ids"].shape[1] :]
    assert 1.2 < decoder.metrics.tau < 3.9, "neither all nor none of the drafts should be kept here"
    for row, prompt in enumerate(rows):
        new = out[row, : sum(decoder.metrics.history[row])].tolist()
        assert_caches_hold(decoder, made[1], row, prompt + new)


@pytest.mark.parametrize("num_draft", [1, 3])
def test_crop_caches_hold_exactly_the_text(num_draft):
    """The same for the slow twin, row by row."""
    model = MODELS["sliding"]
    head = build_head(model, row_of("sliding"), 2)
    decoder = MTPDecoder.from_model(model, head=head, num_speculative_tokens=num_draft, cache=CropCache)
    for prompt in prompts(3):
        out = decoder.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        tokens = out[0].tolist()
        assert int(decoder.cache.lengths) == len(tokens) - 1
        assert_equal(keys_and_values(decoder.cache.window(1).cache, 0, len(tokens) - 1), fresh(model, tokens[:-1]), "the row")
