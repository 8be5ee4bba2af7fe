"""LongCat-Flash: a layer with one latent attention and one plain MLP, behind a base whose layers have two of each and experts."""

import torch
import torch.nn.functional as F
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from tests import tiny
from tests.families.twins import causal_attention, heads, recurrent_drafts, rms_norm, rotated
from tests.families.zoo import Case

UNSAID = ("num_hidden_layers", "num_key_value_heads", "intermediate_size")
SETTINGS = {key: value for key, value in (tiny.DENSE | tiny.LATENT).items() if key not in UNSAID} | {
    "num_layers": 1,
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 16,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "moe_topk": 2,
    "routed_scaling_factor": 1.5,
    "head_dim": 8,
}
AROUND = {"norm_embed": "layers.0.enorm.m", "norm_hidden": "layers.0.hnorm.m", "proj": "layers.0.eh_proj", "norm_out": "norm"}


def build():
    return tiny.fill(LongcatFlashForCausalLM(LongcatFlashConfig(**SETTINGS)).eval(), seed=0, stray=0.9)


def published(head, model):
    """model.mtp.norm, model.mtp.layers.0.enorm.m and so on; the MLP lies a level deeper; the embedding is repeated."""
    tensors = {f"model.mtp.{theirs}.weight": getattr(head.layers[0], ours).weight for ours, theirs in AROUND.items()}
    for name, tensor in head.layers[0].block.state_dict().items():
        tensors["model.mtp.layers.0." + name.replace("mlp.", "transformer_layer.mlp.")] = tensor
    tensors["model.mtp.embed_tokens.weight"] = model.get_input_embeddings().weight
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def config(settings):
    """As published: nothing about the MTP layer."""
    return {key: value for key, value in settings.items() if key != "num_hidden_layers"}


def drafts(model, tensors, text, num_steps):
    settings, num_heads = model.config, 4

    def weight(name):
        return tensors[f"model.mtp.{name}.weight"]

    def norm(x, name, eps=settings.rms_norm_eps):
        return rms_norm(x, weight(name), eps)

    def linear(x, name):
        return F.linear(x, weight(name))

    def attention(x):
        """Queries and keys: 8 numbers without a position, 8 with one; the latter are the same for all keys of a row."""
        theta, rank, stem = settings.rope_parameters["rope_theta"], 16, "layers.0.self_attn."
        latent, place = linear(x, stem + "kv_a_proj_with_mqa").split([rank, 8], dim=-1)
        latent = norm(latent, stem + "kv_a_layernorm", 1e-6) * (tiny.SIZE / rank) ** 0.5
        key, value = heads(latent, weight(stem + "kv_b_proj"), 16).split(8, dim=-1)
        query = norm(linear(x, stem + "q_a_proj"), stem + "q_a_layernorm", 1e-6)
        query = heads(query, weight(stem + "q_b_proj"), 16) * (tiny.SIZE / rank) ** 0.5
        query, turned = query.split(8, dim=-1)
        query = torch.cat([query, rotated(turned, theta)], dim=-1)
        key = torch.cat([key, rotated(place[None], theta).expand(num_heads, -1, -1)], dim=-1)
        return linear(causal_attention(query, key, value, 16**-0.5), stem + "o_proj")

    def mlp(x):
        stem = "layers.0.transformer_layer.mlp."
        return linear(F.silu(linear(x, stem + "gate_proj")) * linear(x, stem + "up_proj"), stem + "down_proj")

    def head(embeds, hidden):
        pair = [norm(embeds, "layers.0.enorm.m"), norm(hidden, "layers.0.hnorm.m")]
        x = linear(torch.cat(pair, dim=-1), "layers.0.eh_proj")
        x = x + attention(norm(x, "layers.0.input_layernorm"))
        x = x + mlp(norm(x, "layers.0.post_attention_layernorm"))
        return norm(x, "norm")

    def states(ids):
        return model.get_decoder()(ids, use_cache=False).last_hidden_state[0]

    return recurrent_drafts(model, states, head, text, num_steps)


CASES = [Case("longcat_flash", "longcat_flash", build, published, drafts, config)]
