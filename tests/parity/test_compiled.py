"""A compiled round does what `decode_round` does, in one graph for every batch size and K, however long the text grows."""

from functools import wraps

import pytest
import torch

from mtpdecode import MTPDecoder, NGramProposer
from mtpdecode.compiled import CompiledRound, _Kind
from tests import tiny

NAMES = ("llama", "sliding", "mimo", "deepseek_v3")
LONG = 90
"""Longer than a bucket of slots: the caches grow on the way."""


def compiled(name, num_layers=1, backend="aot_eager", **options):
    decoder = MTPDecoder.from_model(tiny.target(name), head=tiny.head(name, num_layers), **options)
    decoder.step = CompiledRound(backend)
    return decoder


def compiled_alone():
    """-> decoder, target: a model that may be changed, for no other test has it."""
    target = tiny.build("llama")
    decoder = MTPDecoder.from_model(target, head=tiny.build_head(target, tiny.row_of("llama")), num_speculative_tokens=1)
    decoder.step = CompiledRound("aot_eager")
    return decoder, target


@pytest.fixture
def checked(monkeypatch):
    """Grows by what was found, whenever a graph is looked for by our own check."""
    seen, found = [], _Kind._found
    monkeypatch.setattr(_Kind, "_found", lambda self, given: seen.append(found(self, given)) or seen[-1])
    return seen


@pytest.fixture(autouse=True)
def _no_graphs_of_others():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_whatever_the_lengths(name):
    decoder, rows = compiled(name, num_speculative_tokens=2), tiny.prompts()
    for length in (6, LONG, 20):
        sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=length, do_sample=False)
        tiny.assert_rows(sequences, 9, [tiny.plain(name, row, max_new_tokens=length) for row in rows], "compiled")
        assert num_graphs() == 1, f"{num_graphs()} graphs after texts of {length} tokens"


def test_a_graph_for_each_k_and_batch_size():
    decoder, rows = compiled("llama", 2), tiny.prompts()
    options = {"max_new_tokens": 12, "do_sample": False}
    for k, num_rows, expected in [(1, 3, 1), (2, 3, 2), (0, 3, 3), (2, 5, 4), (2, 3, 4), (1, 3, 4)]:
        decoder.generate(**tiny.padded(rows[:num_rows]), **options, num_speculative_tokens=k)
        assert num_graphs() == expected, f"K = {k}, {num_rows} rows"


@pytest.mark.parametrize(
    "options", [{"temperature": 0.8}, {"top_k": 5, "top_p": 0.9}, {"acceptance": "block"}, {"acceptance": "coupled"}]
)
def test_sampled_text_is_that_of_plain_rounds(options):
    batch, settings = tiny.padded(tiny.prompts()), {"max_new_tokens": 16, "do_sample": True, "seed": 5} | options
    plain = tiny.decoder("llama", 2).generate(**batch, **settings)
    assert torch.equal(compiled("llama", num_speculative_tokens=2).generate(**batch, **settings), plain)
    assert num_graphs() == 1


def test_a_penalty_for_repetition_is_part_of_the_graph(checked):
    """Chat models come with one; rows of all lengths, however long they grow."""
    rows, decoder = tiny.prompts(), compiled("llama", num_speculative_tokens=2)
    options = {"do_sample": False, "repetition_penalty": 1.3, "min_new_tokens": 8}
    for length in (12, LONG, 30):
        sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=length, **options)
        tiny.assert_rows(sequences, 9, [tiny.plain("llama", row, max_new_tokens=length, **options) for row in rows], "compiled")
        assert num_graphs() == 1
    assert checked, "and it runs at once"


def test_auto_changes_k_between_graphs():
    rows = tiny.prompts()
    decoder = compiled("llama", num_speculative_tokens="auto")
    sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=40, do_sample=False)
    tiny.assert_rows(sequences, 9, [tiny.plain("llama", row, max_new_tokens=40) for row in rows], "auto, compiled")
    assert len(set(decoder.metrics.drafted)) > 1
    assert decoder.metrics.seconds["round"] > 0


def test_a_hook_that_comes_later_is_seen():
    """torch guards a graph against much, but not against hooks."""
    decoder, target = compiled_alone()
    ids, options = torch.tensor([[3, 4, 5, 6]]), {"max_new_tokens": 12, "do_sample": False}
    before = decoder.generate(ids, **options)
    handle = target.lm_head.register_forward_hook(lambda module, args, output: output.roll(7, dims=-1))
    hooked = decoder.generate(ids, **options)
    assert torch.equal(hooked, target.generate(ids, **options))
    assert not torch.equal(hooked, before)
    handle.remove()
    assert torch.equal(decoder.generate(ids, **options), before)
    assert num_graphs() == 2, "and the first graph is found again"


def test_a_graph_is_checked_twice_a_call_and_once_for_each_other_size(checked):
    """Behind that it runs at once, until a cache grows."""
    decoder, row = compiled("llama", num_speculative_tokens=2), tiny.prompts()[0]
    sequences = decoder.generate(torch.tensor([row]), max_new_tokens=2 * LONG, do_sample=False)
    assert sequences[0].tolist() == [*row, *tiny.plain("llama", row, max_new_tokens=2 * LONG)]
    assert checked[0] is None, "there is none yet, and torch makes one"
    assert all(checked[1:])
    assert 2 < len(checked) <= 2 * (2 * LONG // 64 + 2)
    assert decoder.metrics.num_rounds > 3 * len(checked)
    checked.clear()
    assert torch.equal(decoder.generate(torch.tensor([row]), max_new_tokens=20, do_sample=False), sequences[:, : len(row) + 20])
    assert len(checked) == 2
    assert all(checked)
    assert num_graphs() == 1


def test_torch_is_not_asked_for_sizes_once_there_is_a_graph(monkeypatch):
    """Its reader switches the tracer off and on, for each size."""
    reader, asked = torch._dynamo.utils.call_size, []
    monkeypatch.setattr(torch._dynamo.utils, "call_size", wraps(reader)(lambda *given: asked.append(given) or reader(*given)))
    decoder, row = compiled("llama", num_speculative_tokens=1, backend="eager"), tiny.prompts()[0]
    for num_tokens in (2, 24):
        asked.clear()
        found = decoder.generate(torch.tensor([row]), max_new_tokens=num_tokens, do_sample=False)
        assert found[0].tolist() == [*row, *tiny.plain("llama", row, max_new_tokens=num_tokens)]
        assert bool(asked) == (num_tokens == 2), "the round that made it, and no other"


def test_a_graph_with_code_of_the_users_is_checked_always(checked):
    decoder, ids = compiled("llama", num_speculative_tokens=1, backend="eager"), torch.tensor([tiny.prompts()[0]])
    options = {"max_new_tokens": 20, "do_sample": False}
    decoder.generate(ids, **options)
    assert checked
    checked.clear()
    handle = decoder.target.lm_head.register_forward_hook(lambda module, args, output: output * 1.0)
    decoder.generate(ids, **options)
    handle.remove()
    assert not checked


def test_two_texts_at_once_keep_to_their_own_graphs():
    """One decoder, two streams that take turns, greedy and sampled: each is what it is alone."""
    decoder, ids = compiled("llama", num_speculative_tokens=2), torch.tensor([tiny.prompts()[0]])
    settings = [{"do_sample": False}, {"do_sample": True, "seed": 3}, {"do_sample": False, "num_speculative_tokens": 1}]
    alone = [list(tiny.decoder("llama", 2).stream(ids, max_new_tokens=30, **each)) for each in settings]
    together = tiny.streamed_in_turns(decoder, ids, settings, max_new_tokens=30)
    for one, other in zip(together, alone, strict=True):
        assert one == other


def test_a_replaced_layer_is_seen_by_the_next_call():
    decoder, target = compiled_alone()
    ids, options = torch.tensor([[3, 4, 5, 6]]), {"max_new_tokens": 12, "do_sample": False}
    before = decoder.generate(ids, **options)
    norm = target.model.norm
    target.model.norm = torch.nn.Sequential(torch.nn.LayerNorm(norm.weight.shape[0]))
    after = decoder.generate(ids, **options)
    assert torch.equal(after, target.generate(ids, **options))
    assert not torch.equal(after, before)


def lengths_by_round(decoder, batch):
    """What every cache of a decoder held behind each round, and what the round appended."""
    seen, step = [], decoder.step

    def watched(state, roles, *args):
        result = step(state, roles, *args)
        seen.append(([cache.lengths.tolist() for cache in roles.caches], result[1][:, 0].tolist()))
        return result

    decoder.step = watched
    decoder.generate(**batch, max_new_tokens=24, do_sample=False)
    return seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's compiler loads parts of its own that say so
@pytest.mark.parametrize(
    ("num_rows", "num_layers", "options"),
    [
        (1, 1, {"num_speculative_tokens": 1, "draft_vocabulary": list(range(0, tiny.VOCAB, 2))}),
        (1, 2, {"num_speculative_tokens": 2, "draft_vocabulary": list(range(0, tiny.VOCAB, 2))}),
        (1, 1, {"num_speculative_tokens": 1}),
        (2, 1, {"num_speculative_tokens": 2, "lookup": NGramProposer(2)}),
    ],
)
def test_inductor_drafts_the_same(num_rows, num_layers, options):
    """Greedy text hides a spoiled draft, so what is compared is how much of each was kept, and every cache's lengths.

    The compiler's reuse of buffers once put the head's lengths into the memory of the tokens that were appended.
    """
    batch = tiny.padded(tiny.prompts()[:num_rows])
    eager, compiled = (
        MTPDecoder.from_model(tiny.target("llama"), head=tiny.head("llama", num_layers), compiled=compiled, **options)
        for compiled in (False, True)
    )
    assert lengths_by_round(compiled, batch) == lengths_by_round(eager, batch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's compiler loads parts of its own that say so
def test_inductor_says_the_same():
    rows = tiny.prompts()
    decoder = MTPDecoder.from_model(tiny.target("llama"), head=tiny.head("llama"), num_speculative_tokens=2, compiled=True)
    sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=LONG, do_sample=False)
    tiny.assert_rows(sequences, 9, [tiny.plain("llama", row, max_new_tokens=LONG) for row in rows], "inductor")
