"""HY-V3: DeepSeek's places, with the router, the correction bias and the shared expert under other names."""

from transformers import HYV3Config, HYV3ForCausalLM

from tests import tiny
from tests.families.layouts import deepseek_layout, twin_of
from tests.families.zoo import Case

PREFIX = "model.layers.{n}."
NAMES = {"norm_embed": "enorm", "norm_hidden": "hnorm", "proj": "eh_proj", "norm_out": "final_layernorm"}
RENAMES = (
    ("mlp.gate.weight", "mlp.router.gate.weight"),
    ("mlp.e_score_correction_bias", "mlp.expert_bias"),
    ("mlp.shared_experts.", "mlp.shared_mlp."),
)
LAYOUT = deepseek_layout(around={ours: PREFIX + theirs for ours, theirs in NAMES.items()}, renames=RENAMES)
SETTINGS = tiny.DENSE | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 16,
    "head_dim": 8,
    "router_scaling_factor": 1.5,
}


def build():
    return tiny.fill(HYV3ForCausalLM(HYV3Config(**SETTINGS)).eval(), seed=8)


CASES = [Case("hy_v3", "hy_v3", build, LAYOUT.published, twin_of(LAYOUT))]
