"""MiMo-V2-Flash: three sliding layers with sinks and plain MLPs behind a base whose last layer sees everything and has experts.

No config field counts them. All three are fed the target's hidden states; a draft that is longer reuses the third.
"""

from functools import partial

import torch
import torch.nn.functional as F
from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

from tests import tiny
from tests.families.twins import causal_attention, heads, rms_norm, rotated_halves
from tests.families.zoo import Case

NUM_LAYERS = 3
SETTINGS = {
    **tiny.DENSE,
    "num_hidden_layers": 6,  # the first and the sixth see everything
    "num_attention_heads": 4,
    "num_key_value_heads": 1,  # sliding layers have twice as many
    "head_dim": 12,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "sliding_window": tiny.WINDOW,
    "rms_norm_eps": 1e-5,
}
AROUND = {"norm_embed": "enorm", "norm_hidden": "hnorm", "proj": "eh_proj", "norm_out": "final_layernorm"}
BLOCK = {"post_attention_layernorm.": "pre_mlp_layernorm.", "self_attn.sinks": "self_attn.attention_sink_bias"}


def build(**changes):
    return tiny.fill(MiMoV2FlashForCausalLM(MiMoV2FlashConfig(**(SETTINGS | changes))).eval(), seed=0)


def published(head, _model, fused=False):
    """model.mtp.layers.{i}.enorm and so on. fused: queries, keys and values are one matrix, as in later models of the line."""
    tensors = {}
    for index, layer in enumerate(head.layers):
        prefix = f"model.mtp.layers.{index}."
        tensors |= {f"{prefix}{theirs}.weight": getattr(layer, ours).weight for ours, theirs in AROUND.items()}
        for name, tensor in layer.block.state_dict().items():
            for ours, theirs in BLOCK.items():
                name = name.replace(ours, theirs)
            tensors[prefix + name] = tensor
        if fused:
            parts = [tensors.pop(f"{prefix}self_attn.{part}_proj.weight") for part in "qkv"]
            tensors[f"{prefix}self_attn.qkv_proj.weight"] = torch.cat(parts)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def config(settings):
    """As published: nothing about MTP layers, and the base described in the words of its time."""
    unsaid = ("layer_types", "mlp_layer_types", "rope_parameters", "rms_norm_eps")
    return {key: value for key, value in settings.items() if key not in unsaid} | {
        "layernorm_epsilon": 1e-5,
        "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1, 1, 1],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 12,
        "swa_v_head_dim": 8,
        "swa_rope_theta": 10000,
        "rope_theta": 5000000,
        "partial_rotary_factor": 0.334,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": tiny.WINDOW - 1,
        "n_shared_experts": None,
        "routed_scaling_factor": None,
    }


# ── the twin ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Layer:
    """One MTP layer, in plain torch."""

    def __init__(self, tensors, prefix, settings):
        self.tensors, self.prefix, self.settings = tensors, prefix, settings

    def linear(self, x, name):
        return F.linear(x, self.tensors[f"{self.prefix}{name}.weight"])

    def norm(self, x, name):
        return rms_norm(x, self.tensors[f"{self.prefix}{name}.weight"], 1e-5)

    def projected(self, x):
        """-> query, key, value (heads, n, size), from three matrices or from one."""
        rows = {"q": 4 * 12, "k": 2 * 12, "v": 2 * 8}
        stem = self.prefix + "self_attn."
        if f"{stem}qkv_proj.weight" in self.tensors:
            matrices = self.tensors[f"{stem}qkv_proj.weight"].split(list(rows.values()))
        else:
            matrices = [self.tensors[f"{stem}{part}_proj.weight"] for part in rows]
        return [heads(x, matrix, size) for matrix, size in zip(matrices, (12, 12, 8), strict=True)]

    def attention(self, x):
        query, key, value = self.projected(x)
        turned = int(12 * 0.334)  # of each query and key, the first four numbers
        query, key = (torch.cat([rotated_halves(y[..., :turned], 10000.0), y[..., turned:]], -1) for y in (query, key))
        sinks = self.tensors[self.prefix + "self_attn.attention_sink_bias"]
        seen = causal_attention(query, key, 0.707 * value, 12**-0.5, self.settings.sliding_window, sinks)
        return self.linear(seen, "self_attn.o_proj")

    def __call__(self, embeds, hidden):
        x = self.linear(torch.cat([self.norm(embeds, "enorm"), self.norm(hidden, "hnorm")], dim=-1), "eh_proj")
        x = x + self.attention(self.norm(x, "input_layernorm"))
        inner = self.norm(x, "pre_mlp_layernorm")
        x = x + self.linear(F.silu(self.linear(inner, "mlp.gate_proj")) * self.linear(inner, "mlp.up_proj"), "mlp.down_proj")
        return self.norm(x, "final_layernorm")


@torch.no_grad()
def drafts(model, tensors, text, num_steps, deeper="target", num_layers=NUM_LAYERS):
    """deeper: what layers behind the first are fed. "target": its states; "chained": what the layer before put out."""
    layers = [Layer(tensors, f"model.mtp.layers.{index}.", model.config) for index in range(num_layers)]
    states = model.get_decoder()(torch.tensor([text[:-1]]), use_cache=False).last_hidden_state[0]
    hidden, tokens, logits = states, list(text[1:]), []
    for step in range(num_steps):
        put_out = layers[min(step, num_layers - 1)](model.get_input_embeddings()(torch.tensor(tokens)), hidden)
        logits.append(model.get_output_embeddings()(put_out[-1]))
        tokens.append(int(logits[-1].argmax()))
        if step < num_layers - 1:
            hidden, tokens = states if deeper == "target" else put_out, tokens[1:]
        else:
            hidden = torch.cat([hidden, put_out[-1:]])
    return torch.stack(logits)


CASES = [
    Case("mimo_v2_flash", "mimo_v2_flash", build, published, drafts, config, NUM_LAYERS),
    Case("mimo_v2_flash", "mimo_v2_flash-fused", build, partial(published, fused=True), drafts, config, NUM_LAYERS),
]
