"""Qwen3-Next: gated delta networks with packed projections, gated attention, experts beside a shared one."""

from functools import partial

from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from tests import tiny
from tests.families.layouts import qwen_layout
from tests.families.zoo import Case, qwen3_5, qwen3_5_moe

SETTINGS = tiny.DENSE | qwen3_5.LINEAR | qwen3_5_moe.EXPERTS
LAYOUT = qwen_layout()


def build(seed=0, **changes):
    return qwen3_5.centred(tiny.fill(Qwen3NextForCausalLM(Qwen3NextConfig(**(SETTINGS | changes))).eval(), seed))


def published_config(settings):
    """The published config.json does not say how many MTP layers there are."""
    return settings


DRAFTS = partial(qwen3_5.drafts, mlp=qwen3_5_moe.mlp)
CASES = [Case("qwen3_next", "qwen3_next", build, LAYOUT.published, DRAFTS, published_config, crop=False)]
