"""Mellum 2: Qwen's names around a layer with a sliding window and experts, although the base's last layer sees everything."""

from functools import partial

from transformers import MellumConfig, MellumForCausalLM

from tests import tiny
from tests.families.layouts import qwen_layout, twin_of
from tests.families.zoo import Case

LAYOUT = qwen_layout()
SETTINGS = tiny.DENSE | {
    "num_hidden_layers": 3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
    "sliding_window": tiny.WINDOW,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}


FULL = {"num_mtp_layers": 1, "mtp_layer_types": ["full_attention"], "mtp_mlp_layer_types": ["dense"]}


def build(**changes):
    return tiny.fill(MellumForCausalLM(MellumConfig(**(SETTINGS | changes))).eval(), seed=0)


CASES = [
    Case("mellum", "mellum", build, LAYOUT.published, twin_of(LAYOUT, types="sliding_attention")),
    Case("mellum", "mellum-full", partial(build, **FULL), LAYOUT.published, twin_of(LAYOUT, mlp_types="dense")),
]
