"""A decoder keeps its caches for the next call: many calls in a row say what as many new decoders say, in the same memory."""

import gc
from functools import cache
from itertools import chain

import pytest
import torch

from mtpdecode import MTPDecoder, NGramProposer, RaggedCache
from mtpdecode.cache import BUCKET, CacheLayout, _RaggedLayer, bucket
from mtpdecode.compiled import CompiledRound
from mtpdecode.families import FAMILIES
from mtpdecode.schedule import ExpectedSpeedup
from tests import tiny
from tests.families.zoo import cases

CPU = torch.device("cpu")
SAMPLED = {"do_sample": True, "seed": 3, "temperature": 0.9}
CALLS = [
    (3, {"max_new_tokens": 24}),
    (3, {"max_new_tokens": 5} | SAMPLED),
    (3, {"max_new_tokens": 24, "num_speculative_tokens": 0}),
    (2, {"max_new_tokens": 12}),
    (2, {"max_new_tokens": 70} | SAMPLED),
    (2, {"max_new_tokens": 9, "prefill_chunk_size": 3}),
    (3, {"max_new_tokens": 12, "num_speculative_tokens": 1} | SAMPLED),
]
"""(rows, options): long and short, wide and narrow, with and without drafts, in turn."""

FEW_CALLS = [(3, {"max_new_tokens": 10}), (3, {"max_new_tokens": 6} | SAMPLED), (3, {"max_new_tokens": 8})]
QUICK = ("qwen3_next", "deepseek_v4", "deepseek_v32")
SLOW = ("qwen4_exp", "nemotron_h", "glm5_next", "inkling", "bailing_hybrid", "minimax_m3_vl", "longcat_flash")
ZOO = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
"""Families that keep more than keys and values: recurrent states, compressed blocks, an indexer's keys, aligned rows."""


def decoder_of(name, **options):
    """A new decoder; its target and head are shared, and built once."""
    model, head = _parts(name)
    return MTPDecoder.from_model(model, head=head, **({"num_speculative_tokens": 2} | options))


@cache
def _parts(name):
    if name in tiny.TARGETS:
        return tiny.target(name), tiny.head(name, 2)
    case = next(case for case in cases() if case.family == name and not case.skip)
    row = next(row for row in FAMILIES if row.family == name)
    model = case.build()
    return model, tiny.build_head(model, row, case.num_layers)


def call(decoder, num_rows, text=0, /, **options):
    """The sequences of so many prompts; text: which prompts."""
    batch = tiny.padded(tiny.prompts(num_rows, text, lengths=(9, 4, 1)))
    return decoder.generate(**batch, **({"do_sample": False} | options))


def places(*caches):
    """Where everything that has slots lies."""
    layers = chain.from_iterable(each.layers for each in caches)
    return {tensor.data_ptr() for layer in layers if isinstance(layer, _RaggedLayer) for tensor in layer.held()}


def recording(made):
    """A factory that remembers what it made."""

    def factory(*asked):
        made.append(RaggedCache(*asked))
        return made[-1]

    return factory


# ── the same text ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def assert_calls_are_those_of_new_decoders(name, calls):
    decoder = decoder_of(name)
    for number, (num_rows, options) in enumerate(calls):
        other = decoder_of(name)
        found, wanted = (call(each, num_rows, number, **options) for each in (decoder, other))
        assert torch.equal(found, wanted), f"{name}, call {number}: {found.tolist()} instead of {wanted.tolist()}"
        assert decoder.metrics.history == other.metrics.history, f"{name}, call {number}: other drafts"


@pytest.mark.parametrize("name", ["llama", "sliding"])
def test_many_calls_in_a_row(name):
    assert_calls_are_those_of_new_decoders(name, CALLS)


@pytest.mark.parametrize("name", ZOO)
def test_families_that_keep_more_than_keys(name):
    if all(case.skip for case in cases() if case.family == name):
        pytest.skip("the installed transformers has no such model")
    assert_calls_are_those_of_new_decoders(name, FEW_CALLS)


# ── the same memory ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_call_allocates_nothing():
    made = []
    decoder = decoder_of("llama", cache=recording(made))
    call(decoder, 3, max_new_tokens=2 * BUCKET)
    cache, before = decoder.cache, places(*made)
    call(decoder, 3, 1, max_new_tokens=20, do_sample=True, seed=1)
    assert decoder.cache is cache
    assert len(made) == 2, "the target's and the head's"
    assert places(*made) == before
    assert cache.num_slots <= 20 + 9 + 8 + bucket(3), "a short text looks at few slots, however many there are"


def test_a_cache_shows_its_call_until_the_next_begins():
    decoder = decoder_of("llama")
    for num_new in (12, 5):
        call(decoder, 3, max_new_tokens=num_new)
        lengths = [length + num_new - 1 for length in (9, 4, 1)]
        assert decoder.cache.lengths.tolist() == lengths
        assert decoder.verifier.cache is decoder.cache


@pytest.mark.parametrize(
    "change",
    [{"num_rows": 2}, {"num_layers": 3}, {"layout": CacheLayout({"full_attention": 4}, "sdpa", torch.float32)}],
    ids=lambda change: next(iter(change)),
)
def test_what_does_not_agree_is_not_reused(change):
    asked = {"layout": CacheLayout({"full_attention": None}, "sdpa", torch.float32), "num_layers": 2, "num_rows": 3}
    manager = RaggedCache(**asked, device=CPU)
    assert manager.cleared(**asked, device=CPU)
    assert not manager.cleared(**(asked | change), device=CPU)
    assert not manager.cleared(**asked, device=torch.device("meta"))


def test_a_subclass_is_not_reused():
    """Nobody knows what else it holds."""

    class Own(RaggedCache):
        pass

    decoder = decoder_of("llama", cache=Own)
    call(decoder, 3, max_new_tokens=4)
    first = decoder.cache
    call(decoder, 3, max_new_tokens=4)
    assert decoder.cache is not first


def test_inference_mode_and_autocast_come_and_go():
    """Tensors of inference mode cannot be written outside of it, and autocast makes keys of another type."""
    decoder = decoder_of("llama")
    wanted = call(decoder, 3, max_new_tokens=8)
    with torch.inference_mode():
        assert torch.equal(call(decoder, 3, max_new_tokens=8), wanted)
        assert torch.equal(call(decoder, 3, max_new_tokens=8), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        call(decoder, 3, max_new_tokens=8)
    assert torch.equal(call(decoder, 3, max_new_tokens=8), wanted)


def test_release_lets_go():
    decoder = decoder_of("llama")
    call(decoder, 3, max_new_tokens=4)
    slots = decoder.cache.layers[0].keys
    decoder.release()
    assert (decoder.cache, decoder.verifier) == (None, None)
    gc.collect()
    holders = [each for each in gc.get_referrers(slots) if isinstance(each, dict)]
    assert not holders, f"{holders} still hold the slots"
    call(decoder, 3, max_new_tokens=4)


# ── numbers that are none ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_an_earlier_call_left_cannot_spoil_a_later_one(attention):
    """0 times nan is nan: slots behind the mask are wiped before they are seen, bucket by bucket."""
    model = tiny.build("llama")
    model.set_attn_implementation(attention)
    decoder = MTPDecoder.from_model(model, head=tiny.build_head(model, tiny.row_of("llama")), num_speculative_tokens=2)
    wanted = [call(decoder, 3, max_new_tokens=length) for length in (2 * BUCKET, BUCKET)][1]
    for layer in chain.from_iterable(spare.layers for spare in decoder._spare.values()):
        for tensor in layer.held():
            tensor.fill_(float("nan"))
    before = places(decoder.cache)
    assert torch.equal(call(decoder, 3, max_new_tokens=BUCKET), wanted)
    assert places(decoder.cache) == before


# ── calls that are not over ─────────────────────────────────────────────────────────────────────────────────────────────────


def drain(*streams):
    """Round by round in turn -> the tokens of each stream's first row."""
    texts = [[] for _ in streams]
    running = list(enumerate(streams))
    while running:
        for number, stream in list(running):
            chunk = next(stream, None)
            if chunk is None:
                running.remove((number, stream))
            else:
                texts[number] += chunk.tokens[0]
    return texts


def test_two_streams_have_a_cache_each():
    rows, options = tiny.prompts(2, lengths=(9, 4)), {"max_new_tokens": 20, "do_sample": False}
    decoder = decoder_of("llama")
    for _ in range(2):  # the second time one of them finds a cache of the first
        streams = [decoder.stream(tiny.one(row), **options) for row in rows]
        assert drain(*streams) == [tiny.plain("llama", row, max_new_tokens=20) for row in rows]


def test_a_suspended_stream_keeps_its_cache():
    row, options = tiny.prompts()[0], {"max_new_tokens": 20, "do_sample": False}
    decoder, wanted = decoder_of("llama"), tiny.plain("llama", row, max_new_tokens=20)
    stream = decoder.stream(tiny.one(row), **options)
    begun, cache = next(stream).tokens[0], decoder.cache
    assert decoder.generate(tiny.one(row), **options)[0, len(row) :].tolist() == wanted
    assert decoder.cache is not cache
    decoder.release()
    assert begun + drain(stream)[0] == wanted


def test_a_closed_stream_gives_its_cache_back():
    row, options = tiny.prompts()[0], {"max_new_tokens": 20, "do_sample": False}
    decoder, wanted = decoder_of("llama"), tiny.plain("llama", row, max_new_tokens=20)
    stream = decoder.stream(tiny.one(row), **options)
    next(stream)
    cache = decoder.cache
    stream.close()
    assert decoder.generate(tiny.one(row), **options)[0, len(row) :].tolist() == wanted
    assert decoder.cache is cache


def test_a_call_that_failed_leaves_a_cache_that_works():
    class Failing(NGramProposer):
        left = 2

        def propose(self, state, num_speculative_tokens, noise):
            self.left -= 1
            if not self.left:
                raise RuntimeError("tired")
            return super().propose(state, num_speculative_tokens, noise)

    row = tiny.prompts()[0]
    decoder = MTPDecoder.from_model(tiny.target("llama"), proposer=Failing())
    with pytest.raises(RuntimeError, match="tired"):
        decoder.generate(tiny.one(row), max_new_tokens=20, do_sample=False)
    again = decoder.generate(tiny.one(row), max_new_tokens=20, do_sample=False)
    assert again[0, len(row) :].tolist() == tiny.plain("llama", row, max_new_tokens=20)


# ── compiled rounds ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def graphs():
    """() -> how many graphs there are."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(name="llama", **options):
    decoder = decoder_of(name, **options)
    decoder.step = CompiledRound("aot_eager")
    return decoder


def test_a_graph_does_not_see_how_many_slots_there_are(graphs):
    """As many as are looked at, more of them, and those of an earlier call: one graph for all."""
    decoder, other = compiled(), decoder_of("llama")
    for length in (6, 3 * BUCKET, 20, 2 * BUCKET - 20):
        assert torch.equal(*(call(each, 3, length, max_new_tokens=length) for each in (decoder, other)))
        assert graphs() == 1, f"{graphs()} graphs after {length} tokens"


@pytest.mark.parametrize("options", [{}, pytest.param(SAMPLED, marks=pytest.mark.slow)], ids=["greedy", "sampled"])
def test_warmup_makes_the_graphs_of_auto_ahead(graphs, options, capsys):
    decoder = compiled(num_speculative_tokens=ExpectedSpeedup((0, 1)))
    decoder.warmup(batch_sizes=(3,), num_tokens=(8, 20), num_rounds=2, progress=False, **options)
    assert graphs() == 2, "one for K = 0 and one for K = 1, whatever the length"
    for text in range(2):
        call(decoder, 3, text, max_new_tokens=20, **options)
    assert graphs() == 2
    decoder.explain()
    assert capsys.readouterr().out.count("tokens/round") == 2


@pytest.mark.parametrize("options", [{}, pytest.param(SAMPLED, marks=pytest.mark.slow)], ids=["greedy", "sampled"])
def test_lookup_is_part_of_the_graph(graphs, options):
    """Half of the rows repeat themselves: these are looked up, in one graph for texts of every length."""
    lookup = NGramProposer(4, min_ngram=2)
    decoder, other = compiled(lookup=lookup), decoder_of("llama", lookup=lookup)
    batch = tiny.padded([[5, 9, 7, 11, 5, 9, 7], [8, 30, 12, 40]])
    for length in (6, 2 * BUCKET, 20):
        settings = {"max_new_tokens": length, "do_sample": False} | options | {"max_new_tokens": length}
        assert torch.equal(decoder.generate(**batch, **settings), other.generate(**batch, **settings))
        assert decoder.metrics.history == other.metrics.history
        assert graphs() == 1, f"{graphs()} graphs after {length} tokens"
