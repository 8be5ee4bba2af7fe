"""Where two texts part, and whether rounding can have done it."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtpdecode.parity import Divergence, first_divergence

PROMPT = [3, 1, 4]


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def greedy(target):
    ids = torch.tensor([PROMPT])
    output = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    return output[0, len(PROMPT) :].tolist()


def test_equal_texts_do_not_part(target, greedy):
    assert first_divergence(target, PROMPT, greedy, list(greedy)) is None


def test_a_wrong_token_is_found_at_its_place_and_is_no_tie(target, greedy):
    wrong = [*greedy[:3], (greedy[3] + 1) % 32, *greedy[4:]]
    found = first_divergence(target, PROMPT, greedy, wrong)
    assert (found.position, found.expected, found.actual) == (3, greedy[3], wrong[3])
    assert found.margin > 2 * found.noise, "another token of a random model is a long way below the best"
    assert not found.is_tie
    assert found.describe(str).startswith(f"new token 4: {wrong[3]} instead of {greedy[3]}; top-2 margin")


def test_two_tokens_with_one_output_row_are_a_tie(target, greedy):
    """Equal rows of the output layer give equal logits, so either token is a right answer."""
    twin = next(token for token in range(32) if token not in (*greedy, *PROMPT))
    with torch.no_grad():
        kept = target.lm_head.weight[twin].clone()
        target.lm_head.weight[twin] = target.lm_head.weight[greedy[0]]
        found = first_divergence(target, PROMPT, greedy, [twin, *greedy[1:]])
        target.lm_head.weight[twin] = kept
    assert (found.position, found.margin) == (0, 0)
    assert found.is_tie


@pytest.mark.parametrize("shorter", ["expected", "actual"])
def test_a_text_that_ends_too_early_is_no_tie(target, greedy, shorter):
    texts = {"expected": greedy, "actual": greedy, shorter: greedy[:4]}
    found = first_divergence(target, PROMPT, **texts)
    assert (found.position, getattr(found, shorter)) == (4, None)
    assert math.isnan(found.margin)
    assert not found.is_tie
    assert "the end" in found.describe(str)


def test_a_margin_within_twice_the_rounding_is_a_tie():
    """Each of the two logits may be off by the noise, in opposite directions."""
    assert Divergence(0, 1, 2, margin=0.2, noise=0.1).is_tie
    assert not Divergence(0, 1, 2, margin=0.21, noise=0.1).is_tie
