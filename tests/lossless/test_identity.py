"""One token, no sampling: what is kept plus what replaces the refused is the target's law, as numbers."""

import pytest
import torch

from mtpdecode import BlockAcceptance, Draft, StandardAcceptance
from mtpdecode.testing import random_table


def laws(num_rows, vocab_size, seed, kind):
    """p, q (B, V) float64."""
    p = random_table(max(num_rows, vocab_size), seed)[0, :num_rows, :vocab_size]
    q = random_table(max(num_rows, vocab_size), seed + 1)[0, :num_rows, :vocab_size]
    if kind == "zeros":
        p, q = p.masked_fill(p < p.median(), 0.0), q.masked_fill(q > q.median(), 0.0)
    if kind == "equal":
        q = p.clone()
    if kind == "one-hot":
        q = torch.zeros_like(q).scatter(1, q.argmax(-1, keepdim=True), 1.0)
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)


def output_law(rule, p, q):
    """The law of one token: sum over drafts x of q(x) [keep(x) at x + (1 - keep(x)) residual]."""
    (num_rows, vocab_size), law = p.shape, torch.zeros_like(p)
    target_probs = torch.stack([p, p], dim=1)
    for token in range(vocab_size):
        draft = Draft(torch.full((num_rows, 1), token), q[:, None])
        keep = rule.keep(draft, target_probs).nan_to_num(0.0)  # 0 / 0 where neither law has the token: it is never drafted
        weights = rule.residual(draft, target_probs, torch.zeros(num_rows, dtype=torch.long))
        refused = (1 - keep) * weights / weights.sum(-1, keepdim=True)
        law += q[:, token, None] * (refused + keep * torch.eye(vocab_size, dtype=p.dtype)[token])
    return law


@pytest.mark.parametrize("kind", ["random", "zeros", "equal", "one-hot"])
@pytest.mark.parametrize("rule", [StandardAcceptance(), BlockAcceptance()], ids=lambda rule: type(rule).__name__)
def test_kept_plus_replaced_is_p(rule, kind):
    """sum_x q(x) (keep(x) + (1 - keep(x)) residual) == p, in float64 to the last digits."""
    p, q = laws(16, 24, seed=3, kind=kind)
    assert (output_law(rule, p, q) - p).abs().max() < 1e-14


@pytest.mark.parametrize("kind", ["random", "zeros", "equal", "one-hot"])
def test_the_identity(kind):
    """min(p, q) + (1 - sum min(p, q)) * residual == p: the line that the whole library rests on."""
    p, q = laws(16, 24, seed=5, kind=kind)
    draft = Draft(q.argmax(-1, keepdim=True), q[:, None])
    weights = StandardAcceptance().residual(draft, torch.stack([p, p], dim=1), torch.zeros(16, dtype=torch.long))
    overlap = torch.minimum(p, q)
    residual = weights / weights.sum(-1, keepdim=True)
    assert (overlap + (1 - overlap.sum(-1, keepdim=True)) * residual - p).abs().max() < 1e-15


def test_chosen_tokens_are_one_hot_draws():
    """probs None and the one-hot law of the same token say the same: keep, residual and all."""
    p, q = laws(16, 24, seed=7, kind="one-hot")
    tokens, target_probs = q.argmax(-1, keepdim=True), torch.stack([p, p], dim=1)
    for rule in (StandardAcceptance(), BlockAcceptance()):
        for kept in (0, 1):
            num_kept = torch.full((16,), kept)
            chosen, drawn = Draft(tokens, None), Draft(tokens, q[:, None])
            assert torch.equal(rule.keep(chosen, target_probs), rule.keep(drawn, target_probs))
            assert torch.equal(rule.residual(chosen, target_probs, num_kept), rule.residual(drawn, target_probs, num_kept))


def test_equal_laws_leave_something_to_draw_from():
    """p equal to q leaves a residual of zeros, which must not become nan: the fallback is p, with a chance of 0."""
    p, _ = laws(16, 24, seed=9, kind="random")
    draft, target_probs = Draft(p.argmax(-1, keepdim=True), p[:, None]), torch.stack([p, p], dim=1)
    for rule in (StandardAcceptance(), BlockAcceptance()):
        assert torch.equal(rule.residual(draft, target_probs, torch.zeros(16, dtype=torch.long)), p)
        assert torch.equal(rule.keep(draft, target_probs), torch.ones(16, 1, dtype=torch.float64))
