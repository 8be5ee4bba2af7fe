"""K-EXAONE: Qwen's names around a dense layer with normed queries and keys, although the base's last layers have experts."""

from functools import partial

import torch
import torch.nn.functional as F
from transformers import ExaoneMoeConfig, ExaoneMoeForCausalLM

from tests import tiny
from tests.families.twins import causal_attention, heads, recurrent_drafts, rms_norm, rotated_halves
from tests.families.zoo import Case

SETTINGS = tiny.DENSE | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "sliding_window": tiny.WINDOW,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
}
AROUND = {"norm_embed": "pre_fc_norm_embedding", "norm_hidden": "pre_fc_norm_hidden", "proj": "fc", "norm_out": "norm"}


def build(**changes):
    return tiny.fill(ExaoneMoeForCausalLM(ExaoneMoeConfig(**(SETTINGS | changes))).eval(), seed=0, stray=0.8)


def published(head, _model):
    """mtp.fc, mtp.norm and so on; mtp.layers.0 is a layer of the base, with a plain MLP."""
    tensors = {f"mtp.{name}.weight": getattr(head.layers[0], ours).weight for ours, name in AROUND.items()}
    tensors |= {f"mtp.layers.0.{name}": tensor for name, tensor in head.layers[0].block.state_dict().items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def config(settings, types=None, windows=None, count=1):
    """As published: attention type and window of each MTP layer, 0 where it sees everything. count: how often it is used."""
    named = {"mtp_layer_types": types, "mtp_sliding_windows": windows}
    return settings | {"num_nextn_predict_layers": count} | {key: value for key, value in named.items() if value}


# ── the twin ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def drafts(model, tensors, text, num_steps, window="target", rope=True):
    settings = model.config
    window = settings.sliding_window if window == "target" else window

    def norm(x, name):
        return rms_norm(x, tensors[f"mtp.{name}.weight"], settings.rms_norm_eps)

    def linear(x, name):
        return F.linear(x, tensors[f"mtp.{name}.weight"])

    def attention(x):
        names = {part: f"layers.0.self_attn.{part}_proj" for part in "qkvo"}
        query, key, value = (heads(x, tensors[f"mtp.{names[part]}.weight"], settings.head_dim) for part in "qkv")
        query, key = norm(query, "layers.0.self_attn.q_norm"), norm(key, "layers.0.self_attn.k_norm")
        if rope:
            theta = settings.rope_parameters["rope_theta"]
            query, key = rotated_halves(query, theta), rotated_halves(key, theta)
        return linear(causal_attention(query, key, value, settings.head_dim**-0.5, window), names["o"])

    def mlp(x):
        gate, up = linear(x, "layers.0.mlp.gate_proj"), linear(x, "layers.0.mlp.up_proj")
        return linear(F.silu(gate) * up, "layers.0.mlp.down_proj")

    def head(embeds, hidden):
        pair = [norm(embeds, "pre_fc_norm_embedding"), norm(hidden, "pre_fc_norm_hidden")]
        x = linear(torch.cat(pair, dim=-1), "fc")
        x = x + attention(norm(x, "layers.0.input_layernorm"))
        x = x + mlp(norm(x, "layers.0.post_attention_layernorm"))
        return norm(x, "norm")

    def states(ids):
        return model.get_decoder()(ids, use_cache=False).last_hidden_state[0]

    return recurrent_drafts(model, states, head, text, num_steps)


FULL, SLIDING = ["full_attention"], ["sliding_attention"]
CASES = [
    Case("exaone_moe", "exaone_moe", build, published, drafts, config),
    Case(
        "exaone_moe",
        "exaone_moe-full",
        build,
        published,
        partial(drafts, window=None),
        partial(config, types=FULL, windows=[0]),
    ),
    Case(
        "exaone_moe",
        "exaone_moe-own-window",
        build,
        published,
        partial(drafts, window=5),
        partial(config, types=SLIDING, windows=[5], count=3),
    ),
]
