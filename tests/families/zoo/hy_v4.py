"""Hunyuan HY-V4: the target has several residual streams, its MTP layer has one.

The layer is latent attention over keys that an indexer picks, with sinks and a gate, and a mixture of experts. Configs say 1 or 2
for the one layer there is.
"""

import torch
import torch.nn.functional as F
from transformers import HYV4Config, HYV4ForCausalLM

from tests import tiny
from tests.families.zoo import Case

PREFIX = "model.mtp_layers.0."
NOPE, ROPE, LATENT, VALUE, HEADS = 8, 8, 16, 8, 4


def build(**changes):
    config = HYV4Config(
        hidden_size=tiny.SIZE,
        vocab_size=tiny.VOCAB,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        intermediate_size=64,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        q_lora_rank=16,
        kv_lora_rank=LATENT,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        index_topk=8,
        index_head_dim=16,
        index_n_heads=8,
        indexer_types=["full", "shared", "full"],
        hc_mult=2,
        swiglu_limit=1.0,
        max_position_embeddings=256,
        pad_token_id=tiny.PAD,
        bos_token_id=tiny.BOS,
        eos_token_id=tiny.EOS,
        **changes,
    )
    return tiny.fill(HYV4ForCausalLM(config).eval(), 0)


def sharing():
    """A target whose config has all draft steps read the keys that the first one chose."""
    return build(index_share_for_mtp_iteration=True)


# ── as it is published ──────────────────────────────────────────────────────────────────────────────────────────────────────

RENAMED = {"self_attn.gate_proj": "self_attn.linear_gate", "self_attn.sinks": "self_attn.learnable_sink_param"}


def published(head, model):
    """Experts packed, as in the released checkpoint."""
    layer = head.layers[0]
    tensors = {
        PREFIX + "enorm.weight": layer.norm_embed.weight,
        PREFIX + "hnorm.weight": layer.norm_hidden.weight,
        PREFIX + "eh_proj.weight": layer.proj.weight,
        PREFIX + "final_layernorm.weight": layer.norm_out.weight,
    }
    for name, tensor in layer.block.state_dict().items():
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        tensors[PREFIX + name] = tensor
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def published_apart(head, model):
    """The same with a matrix per expert."""
    tensors = published(head, model)
    gates, downs = (tensors.pop(f"{PREFIX}mlp.experts.{name}") for name in ("gate_up_proj", "down_proj"))
    for expert, (both, down) in enumerate(zip(gates, downs, strict=True)):
        gate, up = both.chunk(2)
        for name, matrix in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            tensors[f"{PREFIX}mlp.experts.{expert}.{name}.weight"] = matrix.clone()
    return tensors


def one_layer(settings):
    return settings | {"num_nextn_predict_layers": 1}


def said_twice(settings):
    """Some exporters count the head's single layer as two."""
    return settings | {"num_nextn_predict_layers": 2}


# ── the twin ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def drafts(model, tensors, text, num_steps):
    """Row j pairs the hidden state of token j with token j + 1; behind the last true row stand the head's own outputs."""
    weights = {name.removeprefix(PREFIX).removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    tokens, hidden, logits = text[1:], _states(model, text[:-1]), []
    shares = getattr(model.config, "index_share_for_mtp_iteration", False)
    for _ in range(num_steps):
        embeds = model.model.embed_tokens.weight[torch.tensor(tokens)]
        pair = torch.cat([_norm(embeds, weights["enorm"]), _norm(hidden, weights["hnorm"])], dim=-1)
        x = pair @ weights["eh_proj"].T
        read = _norm(x, weights["input_layernorm"])
        x = x + _attention(read, weights, model.config, len(text) - 1 if shares else len(tokens))
        x = x + _mixture(_norm(x, weights["post_attention_layernorm"]), weights, model.config)
        normed = _norm(x[-1:], weights["final_layernorm"])
        logits.append((normed @ model.lm_head.weight.T)[0])
        tokens, hidden = [*tokens, int(logits[-1].argmax())], torch.cat([hidden, normed])
    return torch.stack(logits)


def _states(model, ids):
    """The target's states (n, D) after its streams were made one and normed."""
    kept = []
    hook = model.model.norm.register_forward_hook(lambda _, inputs, output: kept.append(output))
    model(torch.tensor([ids]), use_cache=False)
    hook.remove()
    return kept[0][0]


def _norm(x, weight, eps=1e-5):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotated(x, theta):
    """x (n, h, ROPE): the pair (i, i + half) of row j is turned by j / theta^(i / half)."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None, None] / theta ** (torch.arange(half) / half)
    (a, b), cos, sin = x.split(half, dim=-1), angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _attention(x, weights, config, num_choosing):
    """Rows from num_choosing on attend to what the row before them chose."""
    n, theta = len(x), config.rope_parameters["rope_theta"]
    low = _norm(x @ weights["self_attn.q_a_proj"].T, weights["self_attn.q_a_layernorm"], 1e-6)
    queries = (low @ weights["self_attn.q_b_proj"].T).view(n, HEADS, NOPE + ROPE)
    queries = torch.cat([queries[..., :NOPE], _rotated(queries[..., NOPE:], theta)], dim=-1)
    latent, turning = (x @ weights["self_attn.kv_a_proj_with_mqa"].T).split([LATENT, ROPE], dim=-1)
    latent = _norm(latent, weights["self_attn.kv_a_layernorm"], 1e-6)
    keys, values = (latent @ weights["self_attn.kv_b_proj"].T).view(n, HEADS, NOPE + VALUE).split([NOPE, VALUE], dim=-1)
    keys = torch.cat([keys, _rotated(turning[:, None], theta).expand(-1, HEADS, -1)], dim=-1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * (NOPE + ROPE) ** -0.5
    picked = _picked(x, low, weights, config)
    picked[num_choosing:] = picked[num_choosing - 1].clone()
    scores = scores.masked_fill(~picked, float("-inf"))
    sinks = weights["self_attn.learnable_sink_param"][:, None, None].expand(-1, n, 1)
    shares = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    mixed = torch.einsum("hqk,khd->qhd", shares, values).flatten(1)
    return (mixed * torch.sigmoid(x @ weights["self_attn.linear_gate"].T)) @ weights["self_attn.o_proj"].T


def _picked(x, low, weights, config):
    """(n, n) bool: the `index_topk` keys that the indexer scores highest among those that a row may see."""
    n, heads, size, theta = len(x), config.index_n_heads, config.index_head_dim, config.rope_parameters["rope_theta"]
    name = "self_attn.indexer."
    queries = (low @ weights[name + "wq_b"].T).view(n, heads, size)
    keys = F.layer_norm(x @ weights[name + "wk"].T, (size,), weights[name + "k_norm"], weights[name + "k_norm.bias"], 1e-5)
    still = size - ROPE
    queries = torch.cat([queries[..., :still], _rotated(queries[..., still:], theta)], dim=-1)
    keys = torch.cat([keys[:, :still], _rotated(keys[:, None, still:], theta)[:, 0]], dim=-1)
    says = torch.einsum("qhd,kd->qhk", queries, keys).relu() * (x @ weights[name + "weights_proj"].T)[..., None]
    seen = torch.ones(n, n).tril().bool()
    scores = says.sum(1).masked_fill(~seen, float("-inf"))
    best = scores.topk(min(config.index_topk, n)).indices
    return torch.zeros(n, n).scatter(1, best, 1.0).bool() & seen


def _mixture(x, weights, config):
    scores = torch.sigmoid(x @ weights["mlp.gate"].T)
    chosen = (scores + weights["mlp.gate.e_score_correction_bias"]).topk(config.num_experts_per_tok).indices
    shares = scores.gather(1, chosen)
    shares = config.routed_scaling_factor * shares / shares.sum(-1, keepdim=True)
    shared = [weights[f"mlp.shared_experts.{part}_proj"].T for part in ("gate", "up", "down")]
    out = (F.silu(x @ shared[0]) * (x @ shared[1])) @ shared[2]
    for row in range(len(x)):
        for expert, share in zip(chosen[row].tolist(), shares[row], strict=True):
            out[row] += share * _expert(x[row], expert, weights, config.swiglu_limit)
    return out


def _expert(x, expert, weights, limit):
    if "mlp.experts.gate_up_proj" in weights:
        gate, up = weights["mlp.experts.gate_up_proj"][expert].chunk(2)
        down = weights["mlp.experts.down_proj"][expert]
    else:
        gate, up, down = (weights[f"mlp.experts.{expert}.{part}_proj"] for part in ("gate", "up", "down"))
    return down @ (F.silu((gate @ x).clamp(max=limit)) * (up @ x).clamp(-limit, limit))


CASES = [
    Case("hy_v4", "hy_v4", build, published, drafts, one_layer),
    Case("hy_v4", "hy_v4-experts-apart", sharing, published_apart, drafts, said_twice),
]
