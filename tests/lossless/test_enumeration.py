"""Every rule's exact law, by enumeration in float64: nothing is drawn, so nothing can be luck."""

import pytest
import torch

from mtpdecode import Acceptance, BlockAcceptance, StandardAcceptance
from mtpdecode.laws import text_law, verdict_laws
from mtpdecode.testing import assert_lossless, exact_law, exact_laws, largest_error, rule_problems, table_law

RULES = {"standard": StandardAcceptance(), "block": BlockAcceptance(), "coupled": None}
SAMPLED = pytest.mark.parametrize("sampled", [True, False], ids=["drawn", "chosen"])


def mean_kept(verdicts):
    """How many draft tokens a round keeps, on average."""
    return sum(mass * (len(text) - 1) for text, mass in verdicts.items())


@SAMPLED
@pytest.mark.parametrize("num_draft", [0, 1, 2, 3])
@pytest.mark.parametrize("vocab_size", [2, 3, 4])
@pytest.mark.parametrize("name", RULES)
def test_the_law_is_the_targets(name, vocab_size, num_draft, sampled):
    """The first K + 1 tokens have the target's law to 1e-12: zeros in p, in q, in both, p equal to q; all rows in one call."""
    problems = rule_problems(vocab_size, seed=1)
    for law, (target, _) in zip(exact_laws(RULES[name], problems, num_draft, sampled=sampled), problems, strict=True):
        text, error = largest_error(law, text_law(target, num_draft + 1))
        assert error < 1e-12, f"the probability of {text} is off by {error}"
        assert abs(sum(law.values()) - 1) < 1e-12


@SAMPLED
@pytest.mark.parametrize("name", RULES)
def test_rows_do_not_see_each_other(name, sampled):
    """Rows with other laws, other drafts and other numbers of kept tokens in the same tensors change no digit."""
    problems = rule_problems(3)
    alone = [verdict_laws(RULES[name], [problem], 3, sampled=sampled)[0] for problem in problems]
    assert verdict_laws(RULES[name], problems, 3, sampled=sampled) == alone
    assert verdict_laws(RULES[name], problems[::-1], 3, sampled=sampled) == alone[::-1]


@pytest.mark.parametrize("num_draft", [1, 2, 3])
def test_block_keeps_at_least_as_many_tokens(num_draft):
    """E[kept] of block verification is never below that of the standard rule, above it for some laws, and equal for K = 1."""
    problems = [problem for seed in range(4) for problem in rule_problems(3, seed)]
    standard, block = (list(map(mean_kept, verdict_laws(RULES[name], problems, num_draft))) for name in ("standard", "block"))
    gains = [more - less for more, less in zip(block, standard, strict=True)]
    assert min(gains) > -1e-12, f"block verification keeps {-min(gains)} tokens fewer"
    assert (max(gains) > 0.01) == (num_draft > 1), f"the largest gain is {max(gains)}"


def test_block_keeps_as_many_chosen_tokens():
    """For one-hot drafts block verification gains nothing, on average."""
    problems = rule_problems(4)
    standard, block = (
        list(map(mean_kept, verdict_laws(RULES[name], problems, 3, sampled=False))) for name in ("standard", "block")
    )
    assert block == pytest.approx(standard, abs=1e-12)


def test_chosen_drafts_are_kept_when_the_target_draws_them():
    """For one-hot drafts the standard rule and the comparison with the target's own draw append the same law of texts."""
    problems = rule_problems(4)
    standard, coupled = (verdict_laws(RULES[name], problems, 3, sampled=False) for name in ("standard", "coupled"))
    for one, other in zip(standard, coupled, strict=True):
        assert one == pytest.approx(other, abs=1e-14)


def test_one_token_is_kept_with_the_chance_of_the_overlap():
    """The first draft token is kept with probability sum min(p, q) = 1 - TV."""
    target, draft = rule_problems(4)[0]
    kept = mean_kept(verdict_laws(RULES["standard"], [(target, draft)], 1)[0])
    assert kept == pytest.approx(float(torch.minimum(target(()), draft(())).sum()), abs=1e-15)


def test_no_draft_is_plain_decoding():
    """With K = 0 every rule draws from p, digit for digit."""
    target, draft = rule_problems(4)[0]
    for rule in RULES.values():
        assert exact_law(rule, target, draft, 0) == text_law(target, 1)


class AlwaysAsTarget(StandardAcceptance):
    """A user's own rule: refuses everything and asks the target. Slow, and lossless."""

    def keep(self, draft, target_probs):
        return torch.zeros(draft.tokens.shape, dtype=target_probs.dtype)

    def residual(self, draft, target_probs, num_kept):
        return target_probs.gather(1, num_kept[:, None, None].expand(-1, 1, target_probs.shape[-1]))[:, 0]


@pytest.mark.parametrize(
    "rule", [StandardAcceptance(), BlockAcceptance(), AlwaysAsTarget()], ids=lambda rule: type(rule).__name__
)
def test_assert_lossless_proves_rules(rule):
    """`assert_lossless(rule)` says nothing for lossless rules, the user's own among them."""
    assert isinstance(rule, Acceptance)
    assert_lossless(rule, seed=2)


def test_numbers_of_the_paper_example():
    """p = (1/3, 2/3) and q = (2/3, 1/3), worked by hand: of 2 drafts the standard rule keeps 10/9, block verification 11/9."""
    p, q = torch.tensor([1.0, 2.0]) / 3, torch.tensor([2.0, 1.0]) / 3
    problem = table_law(p.double().repeat(2, 1)), table_law(q.double().repeat(2, 1))
    standard, block = (verdict_laws(RULES[name], [problem], 2)[0] for name in ("standard", "block"))
    assert mean_kept(standard) == pytest.approx(2 / 3 + 4 / 9, abs=1e-7)
    assert mean_kept(block) == pytest.approx(11 / 9, abs=1e-7)
