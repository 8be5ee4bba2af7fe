"""Qwen3.5: three gated delta networks to one gated full attention, dense, alone and inside a model that reads images too."""

from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from tests import tiny

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
GATED = {"head_dim": 16, "layer_types": ["linear_attention", "linear_attention", "full_attention"]}
SETTINGS = tiny.DENSE | LINEAR | GATED | {"num_hidden_layers": 3}


def build(**changes):
    return tiny.fill(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**(SETTINGS | changes))).eval())


CASES = []
