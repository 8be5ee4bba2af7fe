"""Windows are written past `lengths`, `commit` moves them, nothing rolls back: the drawings, and each cache against none."""

import pytest
import torch
from transformers import DynamicCache

from mtpdecode import CacheError, CropCache, RaggedCache
from mtpdecode.cache import BUCKET, CacheLayout, bucket
from tests import tiny

FULL = CacheLayout({"full_attention": None}, "sdpa", torch.float32)
CPU = torch.device("cpu")


def ragged(num_rows=1, num_layers=1, num_slots=8, layout=FULL):
    cache = RaggedCache(layout, num_layers, num_rows, CPU)
    cache.reserve(num_slots)
    return cache


def write(window, value, layer=0):
    """Write keys that all have one value through the transformers Cache; -> the keys that attention sees, (B, slots)."""
    rows, length = window.positions.shape
    keys = torch.full((rows, 1, length, 1), float(value))
    return window.cache.update(keys, keys.clone(), layer)[0][:, 0, :, 0]


# ── the drawings ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [ragged, lambda: CropCache(FULL, 1, 1, CPU)], ids=["RaggedCache", "CropCache"])
def test_the_drawing_of_window_and_commit(make):
    """lengths 4, window(4) writes w and moves nothing, commit 2: lengths 6, and the next window writes over the rest."""
    cache, k, w, n = make(), 1, 2, 3
    write(cache.window(4), k)
    cache.commit(torch.tensor([4]))
    window = cache.window(4)
    assert window.positions.tolist() == [[4, 5, 6, 7]]
    assert write(window, w)[0, :8].tolist() == [k, k, k, k, w, w, w, w]
    assert cache.lengths.tolist() == [4], "a window moves nothing"
    cache.commit(torch.tensor([2]))
    assert cache.lengths.tolist() == [6]
    window = cache.window(2)
    assert window.positions.tolist() == [[6, 7]]
    assert write(window, n)[0, :8].tolist() == [k, k, k, k, w, w, n, n], "what was not committed is overwritten"


@pytest.mark.parametrize("make", [ragged, lambda: CropCache(FULL, 1, 1, CPU)], ids=["RaggedCache", "CropCache"])
def test_windows_behind_what_nobody_committed_yet(make):
    """A head drafts past rows that it will commit later: offset skips them."""
    cache = make()
    write(cache.window(2), 1)
    window = cache.window(1, torch.tensor([2]))
    assert window.positions.tolist() == [[2]]
    assert write(window, 2)[0, :3].tolist() == [1, 1, 2]
    assert window.mask[0, 0, 0, :3].tolist() == [True] * 3, "and it sees them"


def test_the_drawing_of_the_masks():
    """positions 2 3, slots 0 1 2 3: full attention, and a sliding window of 2."""
    layout = CacheLayout({"full_attention": None, "sliding_attention": 2}, "sdpa", torch.float32)
    masks = layout.mask(torch.tensor([[2, 3]]), 4)
    assert masks["full_attention"].int().tolist() == [[[[1, 1, 1, 0], [1, 1, 1, 1]]]]
    assert masks["sliding_attention"].int().tolist() == [[[[0, 1, 1, 0], [0, 0, 1, 1]]]]


def test_a_single_layer_type_gives_a_single_mask():
    mask = FULL.mask(torch.tensor([[0, 1], [2, 3]]), 4)
    assert mask.shape == (2, 1, 2, 4)
    assert mask.dtype == torch.bool, "sdpa takes booleans"


def test_eager_attention_takes_numbers_to_add():
    mask = CacheLayout({"full_attention": None}, "eager", torch.bfloat16).mask(torch.tensor([[1]]), 3)
    assert mask.dtype == torch.bfloat16
    assert mask[0, 0, 0].tolist() == [0, 0, torch.finfo(torch.bfloat16).min]


# ── ragged rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_move_each_at_their_own_speed():
    cache = ragged(num_rows=3)
    write(cache.window(3), 1)
    cache.commit(torch.tensor([3, 1, 0]))
    window = cache.window(2)
    assert window.positions.tolist() == [[3, 4], [1, 2], [0, 1]]
    seen = write(window, 2)
    assert seen[:, :5].tolist() == [[1, 1, 1, 2, 2], [1, 2, 2, 0, 0], [2, 2, 1, 0, 0]]
    cache.commit(torch.tensor([0, 2, 1]))
    assert cache.lengths.tolist() == [3, 3, 1]
    masks = window.mask[:, 0, 0, :5].int().tolist()
    assert masks == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], "slot 2 of row 2 still holds a 1, and nobody sees it"


def test_slots_grow_and_keep_what_they_hold():
    cache = ragged(num_slots=1)
    assert cache.num_slots == BUCKET, "in buckets"
    for value in range(BUCKET):
        write(cache.window(1), value)
        cache.commit(torch.tensor([1]))
    cache.reserve(BUCKET)
    assert cache.num_slots == BUCKET, "enough is enough"
    cache.reserve(BUCKET + 1)
    assert cache.num_slots == 2 * BUCKET
    seen = write(cache.window(1), 99)
    assert seen[0, : BUCKET + 1].tolist() == [*range(BUCKET), 99]
    cache.reserve(3)
    assert cache.num_slots == 2 * BUCKET, "it never shrinks"


def test_many_rows_look_at_fewer_slots_in_vain():
    assert [bucket(num_rows) for num_rows in (1, 2, 3, 4, 64)] == [64, 32, 16, 16, 16]
    assert [ragged(num_rows=num_rows, num_slots=33).num_slots for num_rows in (1, 2, 8)] == [64, 64, 48]


def test_growth_is_amortised():
    """All growth together copies each slot about once, so a long text is not copied every bucket."""
    cache, places = ragged(num_slots=1), set()
    for length in range(1, 16 * BUCKET, BUCKET // 2):
        cache.reserve(length)
        write(cache.window(1), 0)
        places.add(cache._cache.layers[0].keys.shape[2])
    assert len(places) <= 5, f"{16 * BUCKET} slots were reached through {sorted(places)}"


# ── the twins ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", tiny.NAMES)
def test_ragged_and_crop_agree_with_no_cache_at_all(name):
    """A seeded random walk of windows and commits through the real model: logits equal those of the text without a cache."""
    model = tiny.target(name)
    generator = torch.Generator().manual_seed(1)
    decoder = tiny.decoder(name, 0)
    caches = [make(decoder._layout(), model.config.num_hidden_layers, 1, CPU) for make in (RaggedCache, CropCache)]
    text = []
    with torch.no_grad():
        while len(text) < 40:
            ids = torch.randint(3, tiny.VOCAB, (1, int(torch.randint(1, 7, (1,), generator=generator))), generator=generator)
            kept = int(torch.randint(0, ids.shape[1] + 1, (1,), generator=generator))
            whole = torch.cat([torch.tensor([text], dtype=torch.long), ids], dim=1)
            expected = model(whole, use_cache=False).logits[:, len(text) :]
            for cache in caches:
                cache.reserve(len(text) + ids.shape[1])
                window = cache.window(ids.shape[1])
                found = model(
                    ids, attention_mask=window.mask, position_ids=window.positions, **{tiny.CACHE: window.cache}, use_cache=True
                ).logits
                error = float((found - expected).abs().max())
                assert error < 1e-4, f"{name}, {type(cache).__name__}: behind {len(text)} tokens off by {error:.1e}"
                cache.commit(torch.tensor([kept]))
            text += ids[0, :kept].tolist()
    assert [cache.lengths.tolist() for cache in caches] == [[len(text)]] * 2


def test_what_transformers_asks_of_a_cache():
    cache = ragged(num_layers=2)
    window = cache.window(3)
    layer = window.cache.layers[0]
    assert (layer.get_seq_length(), layer.get_mask_sizes(3), layer.get_max_length()) == (BUCKET, (BUCKET, 0), -1)
    assert len(window.cache.layers) == 2
    assert type(window.cache) is not DynamicCache


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_crop_cache_holds_one_row():
    with pytest.raises(CacheError, match=r"asked to hold 3 rows; it holds 1\. Use RaggedCache"):
        CropCache(FULL, 1, 3, CPU)


def test_more_than_was_written_cannot_be_kept():
    cache = CropCache(FULL, 1, 1, CPU)
    write(cache.window(2), 1)
    with pytest.raises(CacheError, match=r"3 tokens were to be kept past slot 0; 2 are written\. Commit no more"):
        cache.commit(torch.tensor([3]))
    assert cache.lengths.tolist() == [0], "and nothing moved"


def test_a_window_leaves_no_gap():
    with pytest.raises(CacheError, match=r"asked for at slot 2; only 0 were ever written\. Give a smaller offset"):
        CropCache(FULL, 1, 1, CPU).window(1, torch.tensor([2]))


def test_writing_costs_what_is_written():
    """Not what is reserved: the operators that write into the slots are none that go through all of them (`scatter_` does)."""
    cache = RaggedCache(CacheLayout({"full_attention": None}, "sdpa", torch.float32), 1, 2, torch.device("cpu"))
    cache.reserve(50)
    states, called = torch.randn(2, 3, 4, 8), []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    cache.window(4).cache.layers[0].update(states, states)
    with Names():
        keys, _ = cache.window(4).cache.layers[0].update(states, states)
    assert not {"scatter_", "scatter", "clone", "copy_", "cat", "gather"} & set(called), f"{called}"
    assert torch.equal(keys[:, :, :4], states)
