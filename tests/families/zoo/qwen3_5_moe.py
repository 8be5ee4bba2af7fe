"""Qwen3.5 with experts, which are published stacked or one by one, and a gated shared one."""

from functools import partial

import torch.nn.functional as F
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeTextConfig

from tests import tiny
from tests.families.layouts import qwen_layout
from tests.families.twins import gated_mlp, mixture
from tests.families.zoo import Case, qwen3_5

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
SETTINGS = {name: value for name, value in qwen3_5.SETTINGS.items() if name != "intermediate_size"} | EXPERTS
LAYOUT = qwen_layout()


def build(seed=0, **changes):
    return qwen3_5.centred(tiny.fill(Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**(SETTINGS | changes))).eval(), seed))


def wrapped(seed=0):
    """The class that reads images too, around the same text model."""
    config = Qwen3_5MoeConfig(text_config=SETTINGS, vision_config=qwen3_5.VISION, image_token_id=3, video_token_id=4)
    return qwen3_5.centred(tiny.fill(Qwen3_5MoeForConditionalGeneration(config).eval(), seed))


def stacked(head, _model):
    """mtp.layers.0.mlp.experts.gate_up_proj (E, 2 I, D) and down_proj (E, D, I), as they are."""
    layer = head.layers[0]
    tensors = {f"{name}.weight": getattr(layer, ours).weight for ours, name in LAYOUT.around.items()}
    tensors |= {f"mtp.layers.0.{name}": tensor for name, tensor in layer.block.state_dict().items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def mlp(x, part):
    """x (n, D) through the two likeliest experts, and through the shared one as much as its gate says."""
    likely, chosen = F.linear(x, part["mlp.gate"]).softmax(-1).topk(EXPERTS["num_experts_per_tok"])

    def expert(number, token):
        if f"mlp.experts.{number}.gate_proj" in part:
            return gated_mlp(token, part, f"mlp.experts.{number}")
        gate, up = F.linear(token, part["mlp.experts.gate_up_proj"][number]).chunk(2)
        return F.linear(F.silu(gate) * up, part["mlp.experts.down_proj"][number])

    routed = mixture(x, chosen, likely / likely.sum(-1, keepdim=True), expert)
    return routed + F.linear(x, part["mlp.shared_expert_gate"]).sigmoid() * gated_mlp(x, part, "mlp.shared_expert")


CASE = partial(
    Case,
    "qwen3_5_moe",
    drafts=partial(qwen3_5.drafts, mlp=mlp),
    config=qwen3_5.published_config,
    crop=False,
)
CASES = [
    CASE("qwen3_5_moe", build, published=LAYOUT.published),
    CASE("qwen3_5_moe-vision-stacked", wrapped, published=stacked),
]
