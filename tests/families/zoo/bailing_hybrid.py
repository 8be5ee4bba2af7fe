"""Ling 3 (Bailing hybrid): Kimi delta attention with latent attention in between; the head is a latent-attention layer."""

import torch
import torch.nn.functional as F

from tests import tiny
from tests.families.layouts import Layout
from tests.families.twins import (
    calmed,
    causal_attention,
    chosen_experts,
    gated_mlp,
    heads,
    mixture,
    recurrent_drafts,
    rms_norm,
    rotated,
)
from tests.families.zoo import Case

try:
    from transformers import BailingHybridConfig, BailingHybridForCausalLM
except ImportError:
    BailingHybridConfig = None

PREFIX = "model.layers.{n}."
NAMES = {"norm_embed": "enorm", "norm_hidden": "hnorm", "proj": "eh_proj", "norm_out": "final_layernorm"}
RENAMES = (
    ("self_attn.o_proj.", "attention.dense."),
    ("self_attn.", "attention."),
    ("mlp.gate.e_score_correction_bias", "mlp.gate.expert_bias"),
)
LAYOUT = Layout(PREFIX, {ours: PREFIX + theirs for ours, theirs in NAMES.items()}, RENAMES)
SETTINGS = {
    "hidden_size": tiny.SIZE,
    "vocab_size": tiny.VOCAB,
    "num_hidden_layers": 4,
    "layer_group_size": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "kda_lower_bound": -1.0,
    "max_position_embeddings": 256,
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
}


def build(seed=0, calm=0.6, **changes):
    return calmed(tiny.fill(BailingHybridForCausalLM(BailingHybridConfig(**(SETTINGS | changes))).eval(), seed), calm)


def drafts(model, tensors, text, num_steps):
    config, prefix = model.config, PREFIX.format(n=model.config.num_hidden_layers)
    part = {name.removeprefix(prefix).removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    nope, rope, rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank

    def norm(x, name, eps=config.rms_norm_eps):
        return rms_norm(x, part[name], eps)

    def attention(x):
        query = heads(x, part["attention.q_proj"], nope + rope)
        latent, turning = F.linear(x, part["attention.kv_a_proj_with_mqa"]).split([rank, rope], -1)
        both = heads(norm(latent, "attention.kv_a_layernorm", 1e-6), part["attention.kv_b_proj"], nope + config.v_head_dim)
        turned = rotated(turning[None], config.rope_theta).expand(len(query), -1, -1)
        query = torch.cat([query[..., :nope], rotated(query[..., nope:], config.rope_theta)], -1)
        key = torch.cat([both[..., :nope], turned], -1)
        out = causal_attention(query, key, both[..., nope:], (nope + rope) ** -0.5)
        gate = F.linear(x, part["attention.g_proj"]).sigmoid().repeat_interleave(config.v_head_dim, -1)
        return F.linear(out * gate, part["attention.dense"])

    def experts(x):
        routing = chosen_experts(
            x, part["mlp.gate"], part["mlp.gate.expert_bias"], config.num_experts_per_tok, config.routed_scaling_factor
        )
        routed = mixture(x, *routing, lambda number, token: gated_mlp(token, part, f"mlp.experts.{number}"))
        return routed + gated_mlp(x, part, "mlp.shared_experts")

    def head(embeds, hidden):
        x = F.linear(torch.cat([norm(embeds, "enorm"), norm(hidden, "hnorm")], -1), part["eh_proj"])
        x = x + attention(norm(x, "input_layernorm"))
        x = x + experts(norm(x, "post_attention_layernorm"))
        return norm(x, "final_layernorm")

    return recurrent_drafts(model, lambda ids: model.model(ids).last_hidden_state[0], head, text, num_steps)


def case(name, **changes):
    skip = "" if BailingHybridConfig else "this transformers has no bailing_hybrid"
    return Case(
        "bailing_hybrid",
        f"bailing_hybrid-{name}",
        lambda: build(**changes),
        LAYOUT.published,
        drafts,
        crop=False,
        skip=skip,
        num_rows=200,
    )


CASES = [case("safe_gate", seed=1), case("softplus_gate", seed=1, kda_safe_gate=False, layer_group_size=4)]
