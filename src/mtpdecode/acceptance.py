"""Which draft tokens are kept: pure functions of the draft, the target's law and noise.

A rule says two things: with what probability each draft token is kept, and from which weights the token behind the last kept one
is drawn. The law of the output follows from these two alone, so tests compute it exactly, without drawing anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .errors import GenerationError
from .sampling import race
from .state import Draft, Noise, Purpose, Verdict


class Acceptance(ABC):
    """An acceptance rule. To be lossless, `keep` and `residual` together must give back the target's law."""

    @abstractmethod
    def keep(self, draft: Draft, target_probs: Tensor) -> Tensor:
        """target_probs (B, K+1, V), row k conditions on draft[:k] -> (B, K) in [0, 1]: the chance of token k to pass its test."""

    @abstractmethod
    def num_kept(self, passed: Tensor) -> Tensor:
        """passed (B, K) bool, the tests' independent outcomes -> (B,) how many draft tokens are kept, from the left."""

    @abstractmethod
    def residual(self, draft: Draft, target_probs: Tensor, num_kept: Tensor) -> Tensor:
        """num_kept (B,) -> weights (B, V) >= 0, of any sum, from which the token behind the kept ones is drawn."""


class StandardAcceptance(Acceptance):
    """Speculative sampling (Leviathan et al. 2023, algorithm 1; Chen et al. 2023).

    Token k is kept while u q(x) < p(x). The first refusal is replaced by a sample of norm(max(p - q, 0)); past the draft q is 0,
    so the same line draws the bonus token.

        draft    b  c  d      u q < p    yes yes no       counts 3
        verdict  b  c  X  .              X ~ norm(max(p_2 - q_2, 0))
    """

    def keep(self, draft: Draft, target_probs: Tensor) -> Tensor:
        return (_of_tokens(target_probs[:, :-1], draft.tokens) / _draft_chances(draft, target_probs)).clamp(max=1.0)

    def num_kept(self, passed: Tensor) -> Tensor:
        return passed.long().cumprod(-1).sum(-1)

    def residual(self, draft: Draft, target_probs: Tensor, num_kept: Tensor) -> Tensor:
        p = _row(target_probs, num_kept)
        return _or_else((p - _draft_row(draft, target_probs, num_kept)).clamp(min=0.0), p)


class BlockAcceptance(Acceptance):
    """Block verification (Sun et al. 2024, 2403.10444): keeps at least as many tokens as the standard rule, on average.

    P_0 = 1, P_i = min(1, P_{i-1} p_i(x_i) / q_i(x_i)); Z_{i+1} = sum_x max(P_i p_{i+1}(x) - q_{i+1}(x), 0). Token i passes with
    probability Z_{i+1} / (Z_{i+1} + 1 - P_i), the last one with P_K, and all tokens up to the *last* that passes are kept.
    The replacement is drawn from max(P_tau p_{tau+1} - q_{tau+1}, 0). For one-hot drafts it equals the standard rule on average.
    """

    def keep(self, draft: Draft, target_probs: Tensor) -> Tensor:
        running = _running_products(draft, target_probs)[:, 1:]
        num_draft = draft.tokens.shape[1]
        steps = [self._leftover(draft, target_probs, running, i) for i in range(1, num_draft)]
        inner = [z / (z + 1 - running[:, i]).clamp(min=torch.finfo(z.dtype).tiny) for i, z in enumerate(steps)]
        ones = [torch.where(running[:, i] >= 1, 1.0, h) for i, h in enumerate(inner)]  # the denominator may be 0 there
        return torch.stack([*ones, running[:, -1]], dim=-1)

    def num_kept(self, passed: Tensor) -> Tensor:
        steps = torch.arange(1, passed.shape[1] + 1, device=passed.device)
        return (passed * steps).amax(-1)

    def residual(self, draft: Draft, target_probs: Tensor, num_kept: Tensor) -> Tensor:
        p = _row(target_probs, num_kept)
        scale = _running_products(draft, target_probs).gather(1, num_kept[:, None])
        q = _draft_row(draft, target_probs, num_kept)
        all_kept = (num_kept == draft.tokens.shape[1])[:, None]
        return torch.where(all_kept, p, _or_else((scale * p - q).clamp(min=0.0), p))

    @staticmethod
    def _leftover(draft: Draft, target_probs: Tensor, running: Tensor, position: int) -> Tensor:
        """Z (B,) of the block that ends before `position`."""
        at = torch.full_like(draft.tokens[:, 0], position)
        difference = running[:, position - 1, None] * target_probs[:, position] - _draft_row(draft, target_probs, at)
        return difference.clamp(min=0.0).sum(-1)


def accept(rule: Acceptance, draft: Draft, target_probs: Tensor, noise: Noise, positions: Tensor) -> Verdict:
    """Apply a rule. target_probs (B, K+1, V); positions (B,) the absolute position of the first draft token.

    The tests and the replacement use random numbers of different purposes, so they are independent of each other and of the
    draft's own.
    """
    num_draft = draft.tokens.shape[1]
    at = positions[:, None] + torch.arange(num_draft, device=positions.device)
    num_kept = torch.zeros_like(positions)
    if num_draft:
        num_kept = rule.num_kept(noise.uniform(at, Purpose.ACCEPT) < rule.keep(draft, target_probs))
    weights = rule.residual(draft, target_probs, num_kept)
    last = race(weights, noise.exponential(positions + num_kept, Purpose.TARGET, weights.shape[-1]))
    return verdict_of(draft, num_kept, last)


def accept_matches(draft: Draft, target_tokens: Tensor) -> Verdict:
    """Keep draft tokens while they are the target's own. target_tokens (B, K+1), each drawn from its position's law.

    With argmax for drawing this is greedy decoding. With noise keyed by position it is Gumbel coupling: the text is that of plain
    sampling with the same seed, whatever the draft was (`docs/lossless.md`).
    """
    num_kept = (draft.tokens == target_tokens[:, :-1]).long().cumprod(-1).sum(-1)
    return verdict_of(draft, num_kept, target_tokens.gather(1, num_kept[:, None])[:, 0])


def verdict_of(draft: Draft, num_kept: Tensor, last: Tensor) -> Verdict:
    """The first num_kept (B,) draft tokens, then last (B,)."""
    tokens = torch.cat([draft.tokens, last[:, None]], dim=1)
    return Verdict(tokens.scatter(1, num_kept[:, None], last[:, None]), num_kept + 1)


ACCEPTANCE: dict[str, Acceptance | None] = {"standard": StandardAcceptance(), "block": BlockAcceptance(), "coupled": None}
"""The lossless rules by name; "coupled" draws from the target and compares (`accept_matches`)."""


def acceptance_named(name: str) -> Acceptance | None:
    """The rule of a name. Raises GenerationError for an unknown one."""
    if not isinstance(name, str) or name not in ACCEPTANCE:
        known = ", ".join(map(repr, ACCEPTANCE))
        raise GenerationError(f"acceptance={name!r} was asked for; known rules are {known}. Pass one of them, or an Acceptance.")
    return ACCEPTANCE[name]


def _row(probs: Tensor, positions: Tensor) -> Tensor:
    """probs (B, n, V), positions (B,) -> (B, V)."""
    return probs.gather(1, positions[:, None, None].expand(-1, 1, probs.shape[-1]))[:, 0]


def _of_tokens(probs: Tensor, tokens: Tensor) -> Tensor:
    """probs (B, K, V), tokens (B, K) -> (B, K), the probability of each token."""
    return probs.gather(-1, tokens[..., None])[..., 0]


def _draft_chances(draft: Draft, target_probs: Tensor) -> Tensor:
    """q(x) (B, K) of the drafted tokens; 1 where they were chosen rather than drawn."""
    if draft.probs is None:
        return torch.ones_like(draft.tokens, dtype=target_probs.dtype)
    return _of_tokens(draft.probs, draft.tokens)


def _draft_row(draft: Draft, target_probs: Tensor, positions: Tensor) -> Tensor:
    """q (B, V) at positions (B,) in 0..K; past the draft it is 0."""
    num_draft = draft.tokens.shape[1]
    if not num_draft:
        return torch.zeros_like(target_probs[:, 0])
    inside = positions.clamp(max=num_draft - 1)
    if draft.probs is None:
        token = draft.tokens.gather(1, inside[:, None])
        q = torch.zeros_like(target_probs[:, 0]).scatter(1, token, 1.0)
    else:
        q = _row(draft.probs, inside)
    return torch.where((positions < num_draft)[:, None], q, 0.0)


def _running_products(draft: Draft, target_probs: Tensor) -> Tensor:
    """P (B, K+1): P_0 = 1, P_i = min(1, P_{i-1} p_i(x_i) / q_i(x_i))."""
    ratios = _of_tokens(target_probs[:, :-1], draft.tokens) / _draft_chances(draft, target_probs)
    products = [torch.ones_like(target_probs[:, 0, 0])]
    for ratio in ratios.unbind(1):
        products.append((products[-1] * ratio).clamp(max=1.0))
    return torch.stack(products, dim=1)


def _or_else(weights: Tensor, fallback: Tensor) -> Tensor:
    """weights (B, V), or the fallback in rows where they underflowed to nothing (p equals q up to rounding)."""
    return torch.where(weights.sum(-1, keepdim=True) > 0, weights, fallback)
