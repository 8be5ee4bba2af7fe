"""ERNIE-4.5: a dense block around which everything is numbered last, the base's final norm, the raw state recycled."""

from functools import partial

import torch
import torch.nn.functional as F
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from tests import tiny
from tests.families.layouts import Layout
from tests.families.twins import causal_attention, rms_norm, rotated
from tests.families.zoo import Case

AROUND = {
    "norm_embed": "model.mtp_emb_norm.{i}",
    "norm_hidden": "model.mtp_hidden_norm.{i}",
    "proj": "model.mtp_linear_proj.{i}",
}
LAYOUT = Layout("model.mtp_block.{i}.", AROUND)
SETTINGS = tiny.DENSE | {
    "num_hidden_layers": 3,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": 16,
    "tie_word_embeddings": True,
}


def build(seed, **changes):
    """Layer 0 is dense, the others are mixtures, the last one too."""
    model = tiny.fill(Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**(SETTINGS | changes))).eval(), seed)
    return enlivened(model, seed) if model.config.tie_word_embeddings else model


@torch.no_grad()
def enlivened(model, seed):
    """With one matrix for both ends a token follows itself; not so when half of the final norm is turned around."""
    generator, embedding = torch.Generator().manual_seed(seed), model.model.embed_tokens.weight
    turn = torch.tensor([-1.0, 1.0]).repeat(tiny.SIZE // 2)
    model.model.norm.weight *= turn
    embedding.copy_(torch.randn(embedding.shape, generator=generator))
    circle = torch.randperm(tiny.VOCAB - 3, generator=generator) + 3
    embedding[circle.roll(-1)] += 0.5 * turn * embedding[circle]
    return model


# ── the head in plain torch ─────────────────────────────────────────────────────────────────────────────────────────────────


def block(x, weights, config):
    """x (n, D) -> (n, D): attention and a gated MLP, each on a normed state and added to it."""

    def linear(name, x):
        return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    size = config.hidden_size // config.num_attention_heads
    normed = rms_norm(x, weights["input_layernorm.weight"], config.rms_norm_eps)
    query, key, value = (linear(f"self_attn.{p}_proj", normed).unflatten(-1, (-1, size)).transpose(0, 1) for p in "qkv")
    theta = config.rope_parameters["rope_theta"]
    seen = causal_attention(rotated(query, theta), rotated(key, theta), value, size**-0.5)
    x = x + linear("self_attn.o_proj", seen)
    normed = rms_norm(x, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    return x + linear("mlp.down_proj", F.silu(linear("mlp.gate_proj", normed)) * linear("mlp.up_proj", normed))


@torch.no_grad()
def drafts(model, tensors, text, num_steps, norm_out=True, zero_first=False):
    """The final norm is the base's, and stands between block and output layer alone: what is fed on is the block's own output.

    norm_out, zero_first: as other engines have it, without that norm, or with zeros instead of row 0's embedding.
    """
    config, prefix = model.config, "model.mtp_block.0."
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    part = {key: tensors[f"model.mtp_{key}.0.weight"] for key in ("emb_norm", "hidden_norm", "linear_proj")}
    hidden, tokens = model.model(torch.tensor([text[:-1]]), use_cache=False).last_hidden_state[0], list(text[1:])
    logits = []
    for _ in range(num_steps):
        embeds = model.model.embed_tokens(torch.tensor(tokens))
        embeds[0] *= not zero_first
        embeds = rms_norm(embeds, part["emb_norm"], config.rms_norm_eps)
        fed = rms_norm(hidden, part["hidden_norm"], config.rms_norm_eps)
        x = F.linear(torch.cat([embeds, fed], -1), part["linear_proj"], tensors.get("model.mtp_linear_proj.0.bias"))
        last = block(x, weights, config)[-1:]
        read = rms_norm(last, model.model.norm.weight, config.rms_norm_eps) if norm_out else last
        logits.append(model.lm_head(read)[0])
        hidden, tokens = torch.cat([hidden, last]), [*tokens, int(logits[-1].argmax())]
    return torch.stack(logits)


biased = partial(build, 13, use_bias=True, tie_word_embeddings=False)

CASES = [
    Case("ernie4_5_moe", "ernie4_5_moe", partial(build, 18), LAYOUT.published, drafts),
    Case("ernie4_5_moe", "ernie4_5_moe-bias", biased, LAYOUT.published, drafts),
]
