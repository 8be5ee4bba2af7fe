"""The fastest way to multiply is found by trying, whatever it is the product is right, and chance does not choose."""

import itertools

import pytest
import torch
from torch import nn

from mtpdecode import MTPDecoder, packing, ways
from mtpdecode.packing import Packing
from mtpdecode.ways import NUM_TOKENS, PACKED, PLAIN, WIDE, Way, can_pack, chosen
from tests import tiny

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this PyTorch packs no weights")
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not can_pack(torch.bfloat16), reason="no packed bfloat16 here"))


def seconds(plain, packed, wide=None):
    """What products took, by number of tokens."""
    taken = {(way, each): float(f(each)) for way, f in ((PLAIN, plain), (PACKED, packed)) for each in NUM_TOKENS}
    return taken | ({(WIDE, each): float(wide(each)) for each in NUM_TOKENS} if wide else {})


def way(name, *numbers):
    """Packed, but for these numbers of tokens."""
    return Way(tuple(name if each in numbers else PACKED for each in NUM_TOKENS))


ALL_WIDE = way(WIDE, *NUM_TOKENS)
CASES = {
    "packed is faster": (seconds(lambda n: 2, lambda n: 1), Way()),
    "plain is faster, by chance": (seconds(lambda n: 0.95, lambda n: 1), Way()),
    "plain is faster for few": (seconds(lambda n: n, lambda n: 3.5), way(PLAIN, 1, 2, 3)),
    "wide is faster": (seconds(lambda n: 99, lambda n: n, lambda n: n / 2), ALL_WIDE),
    "wide is faster, by chance": (seconds(lambda n: 99, lambda n: n, lambda n: n * 0.95), Way()),
    "wide is faster here and there": (seconds(lambda n: 99, lambda n: 1, lambda n: 0.5 if n == 1 else 1), Way()),
    "wide is faster but for one token": (seconds(lambda n: n, lambda n: n, lambda n: 1.5), Way((PACKED, *ALL_WIDE.names[1:]))),
    "all are": (seconds(lambda n: n / 2, lambda n: n, lambda n: 0.9), Way((PLAIN, *ALL_WIDE.names[1:]))),
}


@pytest.mark.parametrize("case", CASES)
def test_the_fastest_is_chosen(case):
    taken, expected = CASES[case]
    assert chosen(taken) == expected


def test_what_does_not_fit_is_not_widened(monkeypatch):
    taken, expected = CASES["wide is faster"]
    assert chosen(taken, may_widen=False) == Way()
    products = [[torch.zeros(8, 4, dtype=torch.bfloat16)]]
    monkeypatch.setattr(ways, "_FOUND", {ways._shape(products[0]): taken})
    for room, way in ((8 * 4 * 4, Way()), (8 * 4 * 4 + 1, expected)):
        monkeypatch.setattr(ways, "memory", lambda room=room: room / ways.MOST_MEMORY)
        assert ways.ways(products) == [way]


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="no packed bfloat16 here")
def test_nothing_is_widened_where_float32_is_not_packed(monkeypatch):
    assert ways.packed_dtypes(torch.bfloat16) == {PACKED: torch.bfloat16, WIDE: torch.float32}
    monkeypatch.setattr(ways, "can_pack", lambda dtype: dtype != torch.float32)
    assert ways.packed_dtypes(torch.bfloat16) == {PACKED: torch.bfloat16}
    assert list(ways.multipliers([(torch.zeros(8, 4, dtype=torch.bfloat16), None)], ways.EVERY)) == [PLAIN, PACKED]


def test_a_machine_that_does_not_tell_its_memory_widens_nothing(monkeypatch):
    assert ways.memory() > 2**28
    monkeypatch.delattr("os.sysconf")
    assert ways.memory() == 0


def test_numbers_in_between_go_as_the_next_smaller_one():
    found = way(PLAIN, 1, 4, NUM_TOKENS[-1])
    plain = [each for each in (0, 1, 2, 3, 4, 5, 6, 7, 31, 32, 1000) if found.of(each) == PLAIN]
    assert plain == [0, 1, 4, 5, 32, 1000]


WAYS = {
    "packed": Way(),
    "wide": ALL_WIDE,
    "plain": way(PLAIN, *NUM_TOKENS),
    "plain for few": way(PLAIN, 1, 2, 3),
    "each": Way((PLAIN, PACKED, WIDE, *ALL_WIDE.names[3:])),
}


def given(name, dtype):
    """That way for every product; what is float32 has no wide one."""
    names = WAYS[name].names
    way = Way(tuple(PACKED if each == WIDE else each for each in names)) if dtype == torch.float32 else WAYS[name]
    return lambda products: [way] * len(products)


def siblings(dtype, bias):
    torch.manual_seed(0)
    module = nn.Module()
    for name, num_out in (("q_proj", 40), ("k_proj", 16), ("v_proj", 8)):
        setattr(module, name, nn.Linear(24, num_out, bias=bias).to(dtype))
    return module


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_every_way_says_what_the_linears_say_and_follows_them(monkeypatch, dtype, bias, way):
    monkeypatch.setattr(packing, "ways", given(way, dtype))
    module, close = siblings(dtype, bias), 1e-5 if dtype == torch.float32 else 2e-2
    packed, inputs = Packing([module]), [torch.randn(n, 24).to(dtype) for n in (1, 2, 3, 4, 40)]
    for change in (lambda weight: weight, lambda weight: weight * 2, lambda weight: nn.Parameter(weight + 1)):
        module.k_proj.weight.data = change(module.k_proj.weight.data)
        packed.renew()
        for x in inputs:
            expected = [child(x) for child in module.children()]
            with packed.used():
                found = [child(x) for child in module.children()]
            for each, other in zip(found, expected, strict=True):
                assert each.dtype == dtype
                torch.testing.assert_close(each, other, rtol=close, atol=close)


@pytest.mark.parametrize("name", ["llama", "mimo"])
@pytest.mark.parametrize("num_drafted", [0, 2])
@pytest.mark.parametrize("way", WAYS)
def test_greedy_text_is_that_of_plain_decoding(monkeypatch, name, num_drafted, way):
    monkeypatch.setattr(packing, "ways", given(way, torch.float32))
    monkeypatch.setattr(packing, "_KNOWN", type(packing._KNOWN)())
    decoder = MTPDecoder.from_model(tiny.target(name), head=tiny.head(name, 2), num_speculative_tokens=num_drafted, packed=True)
    rows = tiny.prompts()
    sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=40, do_sample=False)
    tiny.assert_rows(sequences, 9, [tiny.plain(name, row, max_new_tokens=40) for row in rows], way)


@pytest.mark.parametrize(("name", "num_bytes"), [("packed", 2), ("wide", 4), ("plain", 0), ("plain for few", 2), ("each", 6)])
@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="no packed bfloat16 here")
def test_copies_are_as_large_as_they_say(monkeypatch, name, num_bytes):
    monkeypatch.setattr(packing, "ways", given(name, torch.bfloat16))
    assert Packing([siblings(torch.bfloat16, True)]).num_bytes == 64 * 24 * num_bytes


def few_and_many():
    torch.manual_seed(0)
    return [[torch.randn(64, 32)]], [[torch.randn(1024, 1024)] for _ in range(4)] + [[torch.randn(40, 16), torch.randn(8, 16)]]


def test_every_shape_is_tried_once_and_few_weights_never(monkeypatch):
    monkeypatch.setattr(ways, "_FOUND", {})
    tried, really = [], ways._tried
    monkeypatch.setattr(ways, "_tried", lambda some: tried.append([shape for shape, _ in some]) or really(some))
    few, many = few_and_many()
    assert ways.ways(few) == [Way()]
    assert not tried
    found = ways.ways(many)
    assert found == ways.ways(many), "a second time it is known"
    assert [[(shape.num_out, shape.num_in) for shape in each] for each in tried] == [[(1024, 1024)] * 4 + [(48, 16)]]


def test_large_weights_and_models_are_tried_in_part(monkeypatch):
    monkeypatch.setattr(ways, "MOST", 2**20)
    few, many = few_and_many()
    some = ways._some(many + few)
    shapes = [[tuple(weight.shape) for weight in weights] for weights in some.values()]
    assert shapes == [[(128, 1024)], [(128, 1024)], [(40, 16), (8, 16)], [(64, 32)]]


def test_what_took_longer_is_not_taken(monkeypatch):
    """By a clock that goes on a second when it is looked at, and one more for a packed product of up to three tokens."""
    monkeypatch.setattr(ways, "_FOUND", {})
    clock, product = itertools.count(1.0), ways.packed_product

    def slowed(x, weight, bias):
        if len(x) < 4:
            next(clock)
        return product(x, weight, bias)

    monkeypatch.setattr(ways, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(ways, "packed_product", slowed)
    assert set(ways.ways(few_and_many()[1])) == {way(PLAIN, 1, 2, 3)}
