"""The proofs can fail: each of these faults is planted, and the check that should see it does; without the fault it passes.

They are faults that were found in real decoders, or in this one while it was written. What the exact checks see they see always;
what is sampled is far beyond the threshold, and the seeds are fixed.
"""

from functools import cache, partialmethod

import pytest
import torch

from mtpdecode import BlockAcceptance, MTPDecoder, RaggedCache, StandardAcceptance
from mtpdecode.sampling import _Repeated
from mtpdecode.state import Noise, Purpose, Text
from mtpdecode.testing import TableProposer, assert_lossless, exact_law, random_table, table_law
from mtpdecode.verifier import Verifier
from tests.toys import Contrary, exact_head, table_target

Q = random_table(5, seed=77)


def catches(check, *args, **kwargs):
    """The check refuses what it is given, and says why."""
    with pytest.raises(AssertionError, match=r"not the target's law|is not lossless"):
        check(*args, **kwargs)


def sampled(acceptance="standard", num_speculative_tokens=2, chosen=False, proposer=TableProposer):
    """6,000 texts through the real loop, drafted from Q."""
    drafts = proposer(Q, not chosen)
    assert_lossless(drafts, num_samples=6000, acceptance=acceptance, num_speculative_tokens=num_speculative_tokens)


clean = cache(sampled)
"""The same without a fault, once."""


# ── wrong rules: seen by enumeration ────────────────────────────────────────────────────────────────────────────────────────


def of(probs, positions):
    """probs (B, n, V), positions (B,) -> (B, V)."""
    return probs.gather(1, positions[:, None, None].expand(-1, 1, probs.shape[-1]))[:, 0]


class ResidualWithoutMax(StandardAcceptance):
    """p - q, negative where q is the larger."""

    def residual(self, draft, target_probs, num_kept):
        right, num_draft = super().residual(draft, target_probs, num_kept), draft.tokens.shape[1]
        if draft.probs is None:
            return right
        difference = of(target_probs, num_kept) - of(draft.probs, num_kept.clamp(max=num_draft - 1))
        return torch.where((num_kept < num_draft)[:, None], difference, right)


class ReplacementFromTheTarget(StandardAcceptance):
    """The refused token is replaced by a sample of p, not of the residual."""

    def residual(self, draft, target_probs, num_kept):
        return of(target_probs, num_kept)


class BonusFromTheWrongRow(StandardAcceptance):
    """The token behind a draft that was kept whole comes from the law of the last draft token."""

    def residual(self, draft, target_probs, num_kept):
        last = draft.tokens.shape[1]
        wrong = of(target_probs, (num_kept - 1).clamp(min=0))
        return torch.where((num_kept == last)[:, None], wrong, super().residual(draft, target_probs, num_kept))


class OwnConfidenceDrop(StandardAcceptance):
    """Draft tokens that the head itself gave less than 0.2 are dropped after the draw, and the target goes on from there."""

    def sure(self, draft):
        return draft.probs.gather(-1, draft.tokens[..., None])[..., 0] >= 0.2

    def keep(self, draft, target_probs):
        right = super().keep(draft, target_probs)
        return right if draft.probs is None else torch.where(self.sure(draft), right, 0.0)

    def residual(self, draft, target_probs, num_kept):
        right = super().residual(draft, target_probs, num_kept)
        if draft.probs is None:
            return right
        dropped = torch.cat([~self.sure(draft), torch.zeros_like(draft.tokens[:, :1], dtype=torch.bool)], dim=1)
        return torch.where(dropped.gather(1, num_kept[:, None]), of(target_probs, num_kept), right)


class NeighboursRow(StandardAcceptance):
    """The replacement comes from the law of the next row of the batch."""

    def residual(self, draft, target_probs, num_kept):
        return super().residual(draft, target_probs, num_kept).roll(1, 0)


class StopsAtTheFirstFailure(BlockAcceptance):
    """Block verification that keeps tokens up to the first test that fails, as the standard rule does."""

    def num_kept(self, passed):
        return StandardAcceptance().num_kept(passed)


class KeepsTooMuch(StandardAcceptance):
    """Half again as likely to keep a token: a rule that looks faster."""

    def keep(self, draft, target_probs):
        return (1.5 * super().keep(draft, target_probs)).clamp(max=1)


WRONG_RULES = [
    ResidualWithoutMax(),
    ReplacementFromTheTarget(),
    BonusFromTheWrongRow(),
    OwnConfidenceDrop(),
    NeighboursRow(),
    StopsAtTheFirstFailure(),
    KeepsTooMuch(),
]


@pytest.mark.parametrize("rule", WRONG_RULES, ids=lambda rule: type(rule).__name__)
def test_wrong_rules_are_caught(rule):
    """Enumeration refuses the rule; the rule that it was made from passes."""
    catches(assert_lossless, rule)
    assert_lossless(BlockAcceptance() if isinstance(rule, BlockAcceptance) else StandardAcceptance())


def test_the_price_of_dropping_unsure_tokens():
    """By hand: p is flat over 4 tokens, q = (.55, .25, .15, .05), and tokens below .2 are dropped: (.3, .3, .15, .25) comes."""
    p, q = (table_law(torch.tensor(law).double().repeat(4, 1)) for law in ([0.25] * 4, [0.55, 0.25, 0.15, 0.05]))
    first = [0.0] * 4
    for text, mass in exact_law(OwnConfidenceDrop(), p, q, 1).items():
        first[text[0]] += mass
    assert first == pytest.approx([0.30, 0.30, 0.15, 0.25])


# ── wrong proposers: seen by sampling ───────────────────────────────────────────────────────────────────────────────────────


class SoftmaxForArgmax(TableProposer):
    """Takes the likeliest token and hands over the law that it was not drawn from."""

    def pick(self, law, positions, noise):
        return law.argmax(-1)


class ReplacesUnsureTokens(TableProposer):
    """Draws, and takes the likeliest token instead where the drawn one had less than 0.2."""

    def pick(self, law, positions, noise):
        drawn = super().pick(law, positions, noise)
        return torch.where(law.gather(1, drawn[:, None])[:, 0] < 0.2, law.argmax(-1), drawn)


class LawAtAnotherTemperature(TableProposer):
    """Draws from its law at temperature 0.5 and hands over the law at temperature 1."""

    def pick(self, law, positions, noise):
        return super().pick(law**2, positions, noise)


class DrawsAsTheTarget(TableProposer):
    """Draws with the target's numbers although the rule does not compare draws."""

    def begin(self, call, cache):
        self.purpose = Purpose.TARGET


@pytest.mark.parametrize("acceptance", ["standard", "block"])
@pytest.mark.parametrize("proposer", [SoftmaxForArgmax, ReplacesUnsureTokens, LawAtAnotherTemperature, DrawsAsTheTarget])
def test_wrong_proposers_are_caught(proposer, acceptance):
    """A proposer whose tokens do not have the law, or the independence, that it says."""
    clean(acceptance)
    catches(sampled, acceptance, proposer=proposer)


# ── faults in the loop: planted by monkeypatching ───────────────────────────────────────────────────────────────────────────


def wrong_prefix(text, row, num_draft_tokens=0):
    """What stands before the first draft token, for every draft token."""
    return text.tokens[row : row + 1, int(text.starts[row]) : int(text.lengths[row])]


def at_first(self, penalise, scores, text):
    """Every position as if it were the first."""
    return torch.cat([penalise(self, position[:, None], text) for position in scores.unbind(1)], dim=1)


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 2.5}, {"no_repeat_ngram_size": 2}, {"logits_processor": [Contrary()]}],
    ids=["repetition_penalty", "no_repeat_ngram_size", "a user's own"],
)
def test_processors_with_the_wrong_prefix_are_caught(monkeypatch, options):
    """Every drafted position is scored with the prefix of the first one."""
    check = {"num_samples": 600, "num_speculative_tokens": 2, "acceptance": "standard", **options}
    assert_lossless(TableProposer(Q), **check)
    monkeypatch.setattr(Text, "prefix", wrong_prefix)
    monkeypatch.setattr(_Repeated, "__call__", partialmethod(at_first, _Repeated.__call__))
    catches(assert_lossless, TableProposer(Q), **check)


def test_acceptance_noise_shared_with_the_draft_is_caught(monkeypatch):
    """The test of a token uses numbers of the race in which the token was drawn."""
    clean()
    monkeypatch.setattr(Purpose, "ACCEPT", Purpose.DRAFT)
    catches(sampled)


def test_replacement_noise_shared_with_the_draft_is_caught(monkeypatch):
    """The replacement of a refused token races with the numbers with which the token won."""
    clean()
    monkeypatch.setattr(Purpose, "DRAFT", Purpose.TARGET)
    monkeypatch.setattr(TableProposer, "begin", DrawsAsTheTarget.begin)
    catches(sampled)


def test_one_number_for_a_whole_block_is_caught(monkeypatch):
    """Block verification tests all tokens of a round with one uniform number."""
    clean("block", 3)
    uniform = Noise.uniform
    monkeypatch.setattr(Noise, "uniform", lambda noise, at, purpose: uniform(noise, at[:, :1], purpose).expand(at.shape))
    catches(sampled, "block", 3)


def test_numbers_of_the_last_round_are_caught(monkeypatch):
    """Refused positions are drafted and tested again with the numbers that refused them, which block verification has seen."""
    clean("block", chosen=True)
    monkeypatch.setattr(Noise, "of_round", lambda noise, starts: noise)
    catches(sampled, "block", chosen=True)


def test_rows_that_commit_their_neighbours_counts_are_caught(monkeypatch):
    """Every row keeps as many slots as the luckiest one: refused tokens stay in the cache, and the target sees them."""
    clean()
    commit = RaggedCache.commit
    monkeypatch.setattr(RaggedCache, "commit", lambda cache, counts: commit(cache, counts.amax().expand_as(counts)))
    catches(sampled)


def test_windows_that_see_too_little_are_caught(monkeypatch):
    """Slots of the window itself are hidden from its later tokens: each sees the committed text and itself."""
    clean()
    window = RaggedCache.window

    def short_sighted(cache, num_tokens, offset=None):
        right = window(cache, num_tokens, offset)
        slots = torch.arange(right.mask.shape[-1])
        mask = (slots < cache.lengths[:, None, None, None]) | (slots == right.positions[:, None, :, None])
        return right._replace(mask=mask)

    monkeypatch.setattr(RaggedCache, "window", short_sighted)
    catches(sampled)


# ── faults that leave the law alone: seen by an exact head, whose drafts are never refused ──────────────────────────────────


def acceptance_rates(previous):
    """Of a head that says the target's own law, on ragged rows."""
    target = table_target(5, seed=2)
    decoder = MTPDecoder.from_model(target, head=exact_head(target, previous), num_speculative_tokens=3)
    ids, mask = torch.tensor([[0, 0, 2, 1], [3, 1, 2, 0]]).repeat(8, 1), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).repeat(8, 1)
    decoder.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=True, seed=1)
    return decoder.metrics.acceptance_rate()


@pytest.mark.parametrize("steps", [1, -1])
def test_hidden_states_off_by_one_are_caught(monkeypatch, steps):
    """The head is handed its neighbour's hidden state: the law stays what it was, so only an exact head's acceptance shows it."""
    assert acceptance_rates("hidden") == [1.0, 1.0, 1.0]
    score = Verifier.score

    def shifted(verifier, state, draft):
        scores, hidden = score(verifier, state, draft)
        return scores, hidden.roll(steps, 1)

    monkeypatch.setattr(Verifier, "score", shifted)
    assert acceptance_rates("hidden")[0] < 0.9
    sampled()


def test_head_caches_off_by_one_are_caught(monkeypatch):
    """The head's cache keeps one entry too few, or the draft's own steps: an exact head that stands on its cache shows it."""
    assert acceptance_rates("cache") == [1.0, 1.0, 1.0]
    window = RaggedCache.window

    def shifted(cache, num_tokens, offset=None):
        return window(cache, num_tokens, None if offset is None else offset + 1)

    monkeypatch.setattr(RaggedCache, "window", shifted)
    assert min(acceptance_rates("cache")) < 0.9
