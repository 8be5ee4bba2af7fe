"""The tiny targets have something to test with: varied text, clear decisions, heads that are right about every other time."""

import pytest
import torch

from tests import tiny

NUM_TOKENS = 60


@pytest.mark.parametrize("name", tiny.NAMES)
def test_text_is_varied_and_decided_clearly(name):
    texts = [tiny.plain(name, row, max_new_tokens=NUM_TOKENS) for row in tiny.prompts()]
    for row, text in zip(tiny.prompts(), texts, strict=True):
        assert len(set(text)) >= 8, f"{name}: {text} has too few different tokens to show a fault"
        with torch.no_grad():
            best = tiny.target(name)(tiny.one(row + text)).logits[0, len(row) - 1 :].topk(2).values
        margin = float((best[:, 0] - best[:, 1]).min())
        assert margin > 1e-3, f"{name}: the two best logits of {row} come as close as {margin:.1e}, near to float32 rounding"
    assert len(set(map(tuple, texts))) == len(texts), f"{name}: different prompts give the same text"


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_heads_are_kept_and_refused_at_every_draft_position(name, num_layers):
    decoder = tiny.decoder(name, num_speculative_tokens=3, num_layers=num_layers)
    decoder.generate(**tiny.padded(tiny.prompts(8)), max_new_tokens=NUM_TOKENS // 2, do_sample=False)
    rates = decoder.metrics.acceptance_rate()
    assert all(0.2 <= rate <= 0.9 for rate in rates), f"{name}: {decoder.metrics} would test one branch only"
    by_count = decoder.metrics.histogram().sum(0)[1:].tolist()
    assert all(by_count), f"{name}: of rounds that append 1, 2, 3 and 4 tokens there were {by_count}; each must occur"
