"""DeepSeek-V4: residual streams that hyper-connections mix, caches that hold compressed blocks of tokens, DeepSeek's own names.

The head is fed the streams before the target's mixer and recycles its own. Its layer has a sliding window and nothing compressed
(the last entry of `compress_ratios` in the published config, 0), whatever the target's layers have.
"""

import torch
import torch.nn.functional as F
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from tests import tiny
from tests.families.zoo import Case

PREFIX = "mtp.0."
STREAMS, HEADS, DIM, ROPE, GROUPS, WINDOW, EXPERTS, ROUNDS, LIMIT = 2, 4, 16, 8, 2, 16, 4, 5, 1.0
SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"


def build():
    """One layer of each kind, the first of them with experts chosen by token."""
    config = DeepseekV4Config(
        hidden_size=tiny.SIZE,
        vocab_size=tiny.VOCAB,
        num_hidden_layers=3,
        layer_types=[SLIDING, SPARSE, HEAVY],
        compress_rates={SPARSE: 4, HEAVY: 8},
        mlp_layer_types=["hash_moe", "moe", "moe"],
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=DIM,
        partial_rotary_factor=ROPE / DIM,
        q_lora_rank=16,
        o_groups=GROUPS,
        o_lora_rank=8,
        moe_intermediate_size=16,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        swiglu_limit=LIMIT,
        index_n_heads=16,
        index_head_dim=16,
        index_topk=4,
        hc_mult=STREAMS,
        hc_sinkhorn_iters=ROUNDS,
        sliding_window=WINDOW,
        max_position_embeddings=256,
        pad_token_id=tiny.PAD,
        bos_token_id=tiny.BOS,
        eos_token_id=tiny.EOS,
    )
    model = tiny.fill(DeepseekV4ForCausalLM(config).eval(), 0)
    tokens = torch.arange(tiny.VOCAB)
    model.model.layers[0].mlp.gate.tid2eid.copy_(torch.stack([tokens % EXPERTS, (tokens // 3 + 1) % EXPERTS], dim=1))
    return model


# ── as it is published ──────────────────────────────────────────────────────────────────────────────────────────────────────

PLAIN = {
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.sinks": "attn.attn_sink",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    "attn_hc.fn": "hc_attn_fn",
    "attn_hc.base": "hc_attn_base",
    "attn_hc.scale": "hc_attn_scale",
    "ffn_hc.fn": "hc_ffn_fn",
    "ffn_hc.base": "hc_ffn_base",
    "ffn_hc.scale": "hc_ffn_scale",
}


def published(head, model):
    layer, block = head.layers[0], head.layers[0].block.state_dict()
    tensors = {
        "enorm.weight": layer.norm_embed.weight,
        "hnorm.weight": layer.norm_hidden.weight,
        "e_proj.weight": layer.proj_embed.weight,
        "h_proj.weight": layer.proj_hidden.weight,
        "norm.weight": layer.norm_out.weight,
        "hc_head_fn": layer.mixer.hc_fn,
        "hc_head_base": layer.mixer.hc_base,
        "hc_head_scale": layer.mixer.hc_scale,
    }
    for expert in range(EXPERTS):
        gate, up = block["mlp.experts.gate_up_proj"][expert].chunk(2)
        down = block["mlp.experts.down_proj"][expert]
        tensors |= {f"ffn.experts.{expert}.{name}.weight": each for name, each in (("w1", gate), ("w2", down), ("w3", up))}
    tensors |= {theirs: block[ours] for ours, theirs in PLAIN.items()}
    assert len(block) == len(PLAIN) + 2, "every tensor of the block is published"
    return {PREFIX + name: tensor.detach().clone() for name, tensor in tensors.items()}


def config(settings):
    """The published config counts the head's layer in `compress_ratios`, and has other fields for what transformers derives."""
    for name in ("layer_types", "mlp_layer_types", "partial_rotary_factor", "rope_parameters"):
        settings.pop(name)
    ours = {"compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1, "qk_rope_head_dim": ROPE}
    return settings | ours | {"rope_scaling": None, "num_nextn_predict_layers": 1}


# ── the twin ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def drafts(model, tensors, text, num_steps):
    """Row j pairs the streams of token j with token j + 1; behind the last true row stand the head's own streams."""
    weights = {name.removeprefix(PREFIX).removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    tokens, streams, logits = text[1:], _states(model, text[:-1]), []
    for _ in range(num_steps):
        embeds = _norm(model.model.embed_tokens.weight[torch.tensor(tokens)], weights["enorm"])
        x = _norm(streams, weights["hnorm"]) @ weights["h_proj"].T + (embeds @ weights["e_proj"].T)[:, None]
        x = _around(x, "attn", weights, lambda flow: _attention(flow, weights, model.config))
        x = _around(x, "ffn", weights, lambda flow: _mixture(flow, weights, model.config))
        logits.append((_norm(_collapsed(x[-1:], weights), weights["norm"]) @ model.lm_head.weight.T)[0])
        tokens, streams = [*tokens, int(logits[-1].argmax())], torch.cat([streams, x[-1:]])
    return torch.stack(logits)


def _states(model, ids):
    """The target's streams (n, STREAMS, D) before its mixer."""
    kept = []
    hook = model.model.hc_head.register_forward_hook(lambda _, inputs, output: kept.append(inputs[0]))
    model(torch.tensor([ids]), use_cache=False)
    hook.remove()
    return kept[0][0]


def _norm(x, weight=1.0, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _collapsed(x, weights, eps=1e-6):
    mixes = _norm(x.flatten(1)) @ weights["hc_head_fn"].T
    shares = torch.sigmoid(mixes * weights["hc_head_scale"] + weights["hc_head_base"]) + eps
    return (shares[..., None] * x).sum(1)


def _around(x, site, weights, body, eps=1e-6):
    """streams x (n, S, D): the body sees their weighted sum; what it says goes to every stream by a weight; they mix by a matrix
    whose rows and columns all sum to one."""
    fn, base, scale = (weights[f"hc_{site}_{name}"] for name in ("fn", "base", "scale"))
    takes, gives, mixes = (_norm(x.flatten(1)) @ fn.T).split([STREAMS, STREAMS, STREAMS**2], dim=-1)
    takes = torch.sigmoid(takes * scale[0] + base[:STREAMS]) + eps
    gives = 2 * torch.sigmoid(gives * scale[1] + base[STREAMS : 2 * STREAMS])
    mixes = (mixes * scale[2] + base[2 * STREAMS :]).view(-1, STREAMS, STREAMS).softmax(-1) + eps
    for turn in range(2 * ROUNDS - 1):
        mixes = mixes / (mixes.sum(-1 if turn % 2 else -2, keepdim=True) + eps)
    said = body(_norm((takes[..., None] * x).sum(1), weights[f"{site}_norm"]))
    return gives[..., None] * said[:, None] + torch.einsum("nij,nid->njd", mixes, x)


def _rotated(x, sign=1.0, theta=10000.0):
    """x (n, h, d): the last ROPE channels are turned, neighbours (2i, 2i + 1) of row j by sign * j / theta^(2i / ROPE)."""
    still, turning = x[..., :-ROPE], x[..., -ROPE:]
    angles = sign * torch.arange(len(x))[:, None, None] / theta ** (torch.arange(0, ROPE, 2) / ROPE)
    a, b, cos, sin = turning[..., 0::2], turning[..., 1::2], angles.cos(), angles.sin()
    return torch.cat([still, torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)], dim=-1)


def _attention(x, weights, config):
    """One key for all heads, which is the value too; what the values were turned by is turned back at the end."""
    n = len(x)
    low = _norm(x @ weights["attn.wq_a"].T, weights["attn.q_norm"])
    queries = _rotated(_norm((low @ weights["attn.wq_b"].T).view(n, HEADS, DIM)))
    keys = _rotated(_norm(x @ weights["attn.wkv"].T, weights["attn.kv_norm"])[:, None])[:, 0]
    scores = torch.einsum("qhd,kd->hqk", queries, keys) * DIM**-0.5
    distance = torch.arange(n)[:, None] - torch.arange(n)
    scores = scores.masked_fill((distance < 0) | (distance >= config.sliding_window), float("-inf"))
    sinks = weights["attn.attn_sink"][:, None, None].expand(-1, n, 1)
    shares = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    mixed = _rotated(torch.einsum("hqk,kd->qhd", shares, keys), -1.0)
    groups = zip(mixed.flatten(1).chunk(GROUPS, dim=1), weights["attn.wo_a"].chunk(GROUPS), strict=True)
    return torch.cat([group @ matrix.T for group, matrix in groups], dim=1) @ weights["attn.wo_b"].T


def _mixture(x, weights, config):
    scores = F.softplus(x @ weights["ffn.gate"].T).sqrt()
    chosen = (scores + weights["ffn.gate.bias"]).topk(config.num_experts_per_tok).indices
    shares = scores.gather(1, chosen)
    shares = config.routed_scaling_factor * shares / shares.sum(-1, keepdim=True)
    rows = [_expert(row, "ffn.shared_experts", weights) for row in x]
    for row, experts in enumerate(chosen.tolist()):
        for expert, share in zip(experts, shares[row], strict=True):
            rows[row] = rows[row] + share * _expert(x[row], f"ffn.experts.{expert}", weights)
    return torch.stack(rows)


def _expert(x, name, weights):
    gate, up = (weights[f"{name}.w1"] @ x).clamp(max=LIMIT), (weights[f"{name}.w3"] @ x).clamp(-LIMIT, LIMIT)
    return weights[f"{name}.w2"] @ (F.silu(gate) * up)


CASES = [Case("deepseek_v4", "deepseek_v4", build, published, drafts, config, crop=False)]
