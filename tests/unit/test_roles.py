"""Roles are composable: a user's own proposer, acceptance rule and cache fit in without touching ours."""

import pytest
import torch
from transformers import DynamicCache

from mtpdecode import (
    Acceptance,
    Draft,
    GenerationError,
    KVCacheManager,
    MTPDecoder,
    MTPProposer,
    NGramProposer,
    Proposer,
    RaggedCache,
    StandardAcceptance,
)
from mtpdecode.state import Window
from mtpdecode.testing import assert_lossless
from tests import tiny
from tests.toys import random_head, tiny_llama

LENGTH = 20
GREEDY = {"max_new_tokens": LENGTH, "do_sample": False}


def expected(name="llama", rows=None):
    return [tiny.plain(name, row, max_new_tokens=LENGTH) for row in rows or tiny.prompts()]


# ── proposers ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Stubborn(Proposer):
    """Always proposes the same token. `propose` is all that must be written."""

    def propose(self, state, num_speculative_tokens, noise):
        return Draft(torch.full((state.done.shape[0], num_speculative_tokens), 11), None)


class Clairvoyant(Proposer):
    """Knows the text: proposes what plain decoding will write."""

    def __init__(self, texts):
        self.texts = [text + [3] * 9 for text in texts]

    def begin(self, call, caches):
        assert caches is None, "only heads get a cache"
        self.starts = call.prompt.lengths.tolist()

    def propose(self, state, num_speculative_tokens, noise):
        places = [length - start for length, start in zip(state.text.lengths.tolist(), self.starts, strict=True)]
        guesses = [text[at : at + num_speculative_tokens] for text, at in zip(self.texts, places, strict=True)]
        return Draft(torch.tensor(guesses), None)


class Wild(Proposer):
    """Draws from a law of its own and says so: lossless, though it knows nothing."""

    def propose(self, state, num_speculative_tokens, noise):
        shape = state.done.shape[0], num_speculative_tokens
        probs = torch.ones(*shape, tiny.VOCAB).softmax(-1)
        return Draft(torch.randint(0, tiny.VOCAB, shape), probs)


class Prefilled(Proposer):
    """Learns from the prompt: `absorb` is shown the target's hidden states, chunk by chunk."""

    lag = 2

    def __init__(self):
        self.absorbed = []

    def absorb(self, text, fresh):
        self.absorbed.append(fresh.counts.tolist())

    def propose(self, state, num_speculative_tokens, noise):
        assert state.fresh.states.shape[-1] == tiny.SIZE
        return Draft(state.text.at(state.text.lengths[:, None] - 1).expand(-1, num_speculative_tokens), None)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(
    "make", [Stubborn, lambda: Clairvoyant(expected()), Wild, Prefilled], ids=["fixed", "knows", "wild", "lag"]
)
def test_a_users_proposer(make, k):
    decoder = MTPDecoder.from_model(tiny.target("llama"), proposer=make(), num_speculative_tokens=k)
    sequences = decoder.generate(**tiny.padded(tiny.prompts()), **GREEDY)
    tiny.assert_rows(sequences, 9, expected(), f"{type(decoder.proposer).__name__}, K={k}")
    sampled = decoder.generate(**tiny.padded(tiny.prompts()), max_new_tokens=LENGTH, do_sample=True, seed=1)
    assert sampled.shape[0] == 5


def test_who_knows_the_text_needs_the_fewest_rounds():
    decoder = MTPDecoder.from_model(tiny.target("llama"), proposer=Clairvoyant(expected()), num_speculative_tokens=4)
    decoder.generate(**tiny.padded(tiny.prompts()), **GREEDY)
    assert decoder.metrics.tau == 5.0, f"every draft is right, so K + 1 tokens a round: {decoder.metrics}"
    assert decoder.metrics.num_rounds == LENGTH // 5


def test_what_absorb_is_shown():
    proposer = Prefilled()
    decoder = MTPDecoder.from_model(tiny.target("llama"), proposer=proposer, num_speculative_tokens=2)
    decoder.generate(**tiny.padded(tiny.prompts()), **GREEDY, prefill_chunk_size=4)
    assert proposer.absorbed[0] == [4, 0, 3, 1, 4], "the first chunk of four, without each row's last token"
    assert proposer.absorbed[1] == [3 + 4, 0, 3, 1, 3 + 2], "the next chunk, behind the lag + 1 states that are shown again"


# ── acceptance rules ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Never(Acceptance):
    """Refuses every draft, and draws from the target: the slowest lossless rule."""

    def keep(self, draft, target_probs):
        return torch.zeros_like(draft.tokens, dtype=target_probs.dtype)

    def num_kept(self, passed):
        return passed.long().cumprod(-1).sum(-1)

    def residual(self, draft, target_probs, num_kept):
        return target_probs[:, 0]


class Half(StandardAcceptance):
    """The standard rule behind a coin: still lossless, for the residual is mixed accordingly."""

    def keep(self, draft, target_probs):
        return 0.5 * super().keep(draft, target_probs)

    def residual(self, draft, target_probs, num_kept):
        inside = num_kept.clamp(max=draft.tokens.shape[1] - 1)[:, None, None]
        p = target_probs.gather(1, num_kept[:, None, None].expand(-1, 1, target_probs.shape[-1]))[:, 0]
        q = torch.zeros_like(p).scatter(1, draft.tokens.gather(1, inside[..., 0]), 1.0)
        if draft.probs is not None:
            q = draft.probs.gather(1, inside.expand(-1, 1, draft.probs.shape[-1]))[:, 0]
        past = (num_kept == draft.tokens.shape[1])[:, None]
        return torch.where(past, p, p - 0.5 * torch.minimum(p, q))


@pytest.mark.parametrize("rule", [Never(), Half()])
def test_a_users_rule(rule):
    decoder = tiny.decoder("llama", 3, acceptance=rule)
    sequences = decoder.generate(**tiny.padded(tiny.prompts()), **GREEDY)
    tiny.assert_rows(sequences, 9, expected(), type(rule).__name__)
    mine = decoder.metrics.tau
    decoder.generate(**tiny.padded(tiny.prompts()), **GREEDY, acceptance="standard")
    assert mine < decoder.metrics.tau, f"the rule was not asked: tau {mine}"
    sampled = decoder.generate(**tiny.padded(tiny.prompts()), max_new_tokens=LENGTH, do_sample=True, seed=1, acceptance=rule)
    assert sampled.shape == (5, 9 + LENGTH)


# ── caches ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class NeverCropped(KVCacheManager):
    """transformers' growing cache, never cropped: every window is appended, and the mask hides what a later one has replaced.

    slots   0 1 2 3 | 2 3 4     positions 2 and 3 were written twice, and the first ones are hidden
    """

    def __init__(self, layout, num_layers, num_rows, device):
        self.layout, self.cache = layout, DynamicCache()
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.places = torch.zeros(num_rows, 0, dtype=torch.long, device=device)

    def window(self, num_tokens, offset=None):
        start = self.lengths if offset is None else self.lengths + offset
        positions = start[:, None] + torch.arange(num_tokens)
        self.places = torch.cat([self.places, positions], dim=1)
        same = self.places[:, :, None] == self.places[:, None]
        newest = ~same.triu(diagonal=1).any(-1)
        seen = newest[:, None, None] & (self.places[:, None, None] <= positions[:, None, :, None])
        return Window(positions, seen, self.cache)

    def commit(self, counts):
        self.lengths = self.lengths + counts

    def reserve(self, num_slots):
        """Nothing: it grows with every window."""


@pytest.mark.parametrize("name", ["llama", "glm4_moe", "deepseek_v3"])
def test_a_users_cache(name):
    rows = tiny.prompts()
    decoder = tiny.decoder(name, 3, cache=NeverCropped)
    sequences = decoder.generate(**tiny.padded(rows), **GREEDY)
    tiny.assert_rows(sequences, 9, expected(name), f"{name} with a cache of the user's")
    history = decoder.metrics.history
    ours = tiny.decoder(name, 3)
    ours.generate(**tiny.padded(rows), **GREEDY)
    assert history == ours.metrics.history, "the head drafted otherwise, so its cache held something else"
    assert type(decoder.cache) is NeverCropped


def test_a_factory_may_be_any_callable():
    made = []

    def factory(layout, num_layers, num_rows, device):
        made.append((sorted(layout.windows), num_layers, num_rows, str(device)))
        return RaggedCache(layout, num_layers, num_rows, device)

    decoder = tiny.decoder("sliding", 2, 2, cache=factory)
    decoder.generate(**tiny.padded(tiny.prompts()), max_new_tokens=2)
    target, head = ["full_attention", "sliding_attention"], ["sliding_attention"]
    assert made == [(target, 2, 5, "cpu"), (head, 2, 5, "cpu")], "first the target's, then the head's"
    made.clear()
    decoder.generate(**tiny.padded(tiny.prompts(3)), max_new_tokens=2, num_speculative_tokens=0)
    assert made == [(target, 2, 3, "cpu")], "without drafts the head needs no cache"


# ── public attributes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_decoder_shows():
    head = tiny.head("llama")
    decoder = tiny.decoder("llama", 2)
    assert (decoder.target, decoder.head) == (tiny.target("llama"), head)
    assert isinstance(decoder.proposer, MTPProposer)
    assert (decoder.verifier, decoder.cache, decoder.metrics) == (None, None, None), "before the first call"
    decoder.generate(tiny.one([5, 6]), max_new_tokens=2)
    assert decoder.verifier.cache is decoder.cache
    assert decoder.verifier.target is decoder.target


# ── two drafters ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_repeated_text_is_looked_up_and_another_is_left_to_the_head():
    """One batch, one row of each kind: each drafts what its own drafter would have drafted alone."""
    model, head, lookup = tiny.target("llama"), tiny.head("llama"), NGramProposer(4, min_ngram=3)
    repeated, other = [5, 9, 7, 11, 5, 9, 7], [8, 30, 12, 40]
    mixed = MTPDecoder.from_model(model, head=head, lookup=lookup, num_speculative_tokens=3)
    assert first_draft(mixed, [repeated, other]) == [
        first_draft(MTPDecoder.from_model(model, proposer=lookup, num_speculative_tokens=3), [repeated])[0],
        first_draft(MTPDecoder.from_model(model, head=head, num_speculative_tokens=3), [other])[0],
    ]


def first_draft(decoder, rows):
    drafts, propose = [], type(decoder.proposer).propose

    class Spy(type(decoder.proposer)):
        def propose(self, *args):
            drafts.append(propose(self, *args))
            return drafts[-1]

    decoder.proposer.__class__ = Spy
    decoder.generate(**tiny.padded(rows), max_new_tokens=1, do_sample=False)
    return drafts[0].tokens.tolist()


def test_two_drafters_write_the_same_text():
    rows = tiny.prompts()
    decoder = MTPDecoder.from_model(
        tiny.target("llama"), head=tiny.head("llama"), lookup=NGramProposer(2), num_speculative_tokens=3
    )
    sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=24, do_sample=False)
    tiny.assert_rows(sequences, 9, [tiny.plain("llama", row, max_new_tokens=24) for row in rows], "lookup and head")


def test_two_drafters_are_lossless():
    target = tiny_llama(5, seed=3)
    decoder = MTPDecoder.from_model(target, head=random_head(target), lookup=NGramProposer(2), num_speculative_tokens=2)
    assert_lossless(decoder, num_samples=4000)


@pytest.mark.parametrize(("most", "least"), [(0, 1), (2, 3), (2, 0)])
def test_sizes_that_are_none(most, least):
    with pytest.raises(GenerationError, match="min_ngram at most max_ngram"):
        NGramProposer(most, least)


def test_lookup_goes_with_a_head():
    with pytest.raises(GenerationError, match="lookup= go with a head"):
        MTPDecoder.from_model(tiny.target("llama"), proposer=NGramProposer(), lookup=NGramProposer())
