"""Qwen4-exp: residual streams from the embedding to a mixer that makes them one; no norm behind it.

The head is fed the streams before the mixer and recycles its own; both projections are square, and their results are added. Its
block attends to the tokens of the blocks that an indexer picks, and has no n-gram embeddings though layers of the target do.
"""

from functools import partial

import torch
import torch.nn.functional as F
from transformers import Qwen4ExpConfig, Qwen4ExpForCausalLM, Qwen4ExpForConditionalGeneration, Qwen4ExpTextConfig

from tests import tiny
from tests.families.zoo import Case
from tests.families.zoo.qwen3_5 import VISION

PREFIX = "mtp."
STREAMS, HEADS, GROUPS, DIM, RATIO, BUDGET = 2, 4, 2, 16, 4, 8

SETTINGS = {
    "hidden_size": tiny.SIZE,
    "vocab_size": tiny.VOCAB,
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": DIM,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hc_count": STREAMS,
    "hc_lowrank": 8,
    "indexer_n_heads": 8,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": BUDGET,
    "indexer_compress_ratio": RATIO,
    "max_position_embeddings": 256,
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
}
NGRAMS = {
    "ple_layer_ids": [3],
    "ple_embed_dim": 16,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 97,
    "make_ngram_vocab_size_divisible_by": 4,
    "split_ngram_parts": 2,
}


def build():
    """All draft steps read the tokens that the first one picked."""
    config = Qwen4ExpTextConfig(**SETTINGS, index_share_for_mtp_iteration=True)
    return tiny.fill(Qwen4ExpForCausalLM(config).eval(), 0)


def wrapped():
    """The class that reads images too, as in the released checkpoint, with n-grams in one layer of the text model."""
    config = Qwen4ExpConfig(text_config=SETTINGS | NGRAMS, vision_config=VISION, image_token_id=3, video_token_id=4)
    return tiny.fill(Qwen4ExpForConditionalGeneration(config).eval(), 3)


# ── as it is published ──────────────────────────────────────────────────────────────────────────────────────────────────────


def published(head, model):
    """Experts packed, as in the released checkpoint."""
    layer = head.layers[0]
    tensors = {
        "mtp.pre_fc_norm_embedding.weight": layer.norm_embed.weight,
        "mtp.pre_fc_norm_hidden.weight": layer.norm_hidden.weight,
        "mtp.fc_embedding.weight": layer.proj_embed.weight,
        "mtp.fc_hidden.weight": layer.proj_hidden.weight,
    }
    tensors |= {"mtp.hyper_connection_mixer." + name: tensor for name, tensor in layer.mixer.state_dict().items()}
    tensors |= {"mtp.layers.0." + name: tensor for name, tensor in layer.block.state_dict().items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def config(settings):
    """The number of MTP layers stands beside the other settings of the text model."""
    settings.get("text_config", settings).update(mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False)
    return settings


# ── the twin ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def drafts(model, tensors, text, num_steps):
    """Row j pairs the streams of token j with token j + 1; behind the last true row stand the head's own streams."""
    weights = {name.removeprefix(PREFIX).removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    tokens, streams, logits = text[1:], _states(model, text[:-1]), []
    config = model.config.get_text_config()
    shares = getattr(config, "index_share_for_mtp_iteration", False)
    for _ in range(num_steps):
        embeds = _norm(model.get_input_embeddings().weight[torch.tensor(tokens)], weights["pre_fc_norm_embedding"])
        hidden = _norm(streams, weights["pre_fc_norm_hidden"]).view(len(tokens), STREAMS, tiny.SIZE)
        x = hidden @ weights["fc_hidden"].T + (embeds @ weights["fc_embedding"].T)[:, None]
        num_picking = len(text) - 1 if shares else len(tokens)
        x = _around(x, "attn", weights, partial(_attention, weights=weights, config=config, num_picking=num_picking))
        x = _around(x, "mlp", weights, partial(_mixture, weights=weights, config=config))
        mixed, _ = _mixed(x, "hyper_connection_mixer", weights)
        logits.append(mixed[-1] @ model.lm_head.weight.T)
        tokens, streams = [*tokens, int(logits[-1].argmax())], torch.cat([streams, x[-1:].flatten(1)])
    return torch.stack(logits)


def _states(model, ids):
    """The target's streams (n, STREAMS * D) before its mixer."""
    kept = []
    mixer = model.get_decoder().get_decoder().hyper_connection_mixer
    hook = mixer.register_forward_hook(lambda _, inputs, output: kept.append(inputs[0]))
    model(torch.tensor([ids]), use_cache=False)
    hook.remove()
    return kept[0][0]


def _norm(x, weight, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight)


def _around(x, site, weights, body):
    """streams (n, STREAMS, D) -> the same with what the body makes of their mixture added to each, by as much as each wants."""
    name = f"layers.0.{site}_hyper_connection"
    flow, normed = _mixed(x, name, weights)
    wants = 2 * torch.sigmoid(normed @ weights[name + ".block_inject_weight"].T / STREAMS)
    return x + wants[..., None] * body(flow)[:, None]


def _mixed(x, name, weights):
    normed = _norm(x, weights[name + ".hc_norm"].view(STREAMS, tiny.SIZE)).flatten(1)
    low = F.silu(normed @ weights[name + ".input_mix_weight_down"].T / STREAMS)
    shares = torch.sigmoid(low @ weights[name + ".input_mix_weight_up"].T)
    return (shares * normed).view(-1, STREAMS, tiny.SIZE).mean(1), normed


def _rotated(x, rows, theta):
    """x (n, h, d): the pair (i, i + half) of the row at position rows[j] is turned by rows[j] / theta^(i / half)."""
    half = DIM // 2
    angles = rows[:, None, None] / theta ** (torch.arange(half) / half)
    (a, b), cos, sin = x.split(half, dim=-1), angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _attention(x, weights, config, num_picking):
    """Rows from num_picking on attend to what the row before them picked."""
    n, theta, name = len(x), config.rope_parameters["rope_theta"], "layers.0.self_attn."
    rows = torch.arange(n)
    queries, gate = (x @ weights[name + "q_proj"].T).view(n, HEADS, 2 * DIM).split(DIM, dim=-1)
    keys, values = ((x @ weights[name + part].T).view(n, GROUPS, DIM) for part in ("k_proj", "v_proj"))
    queries = _rotated(_norm(queries, weights[name + "q_norm"]), rows, theta)
    keys = _rotated(_norm(keys, weights[name + "k_norm"]), rows, theta).repeat_interleave(HEADS // GROUPS, dim=1)
    values = values.repeat_interleave(HEADS // GROUPS, dim=1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * DIM**-0.5
    picked = _picked(x, weights, theta)
    picked[num_picking:] = picked[num_picking - 1].clone()
    shares = scores.masked_fill(~picked, float("-inf")).softmax(-1)
    mixed = torch.einsum("hqk,khd->qhd", shares, values) * torch.sigmoid(gate)
    return mixed.flatten(1) @ weights[name + "o_proj"].T


def _picked(x, weights, theta):
    """(n, n) bool: the tokens of the best whole blocks of RATIO, and those after the last whole block.

    Every row counts its blocks anew: those that are whole at that row. A block's key is the mean of its tokens', normed, then
    turned as its first token is.
    """
    n, name = len(x), "layers.0.self_attn.indexer."
    both = (x @ weights[name + "index_qk_proj"].T).view(n, -1, DIM)
    queries, raw = both[:, :-1], both[:, -1]
    queries = _rotated(_norm(queries, weights[name + "q_layernorm"]), torch.arange(n), theta)
    seen = torch.zeros(n, n, dtype=torch.bool)
    for row in range(n):
        whole = (row + 1) // RATIO
        seen[row, whole * RATIO : row + 1] = True
        if whole:
            pooled = _norm(raw[: whole * RATIO].view(whole, RATIO, DIM).mean(1), weights[name + "k_layernorm"])
            keys = _rotated(pooled[:, None], RATIO * torch.arange(whole), theta)[:, 0]
            scores = (queries[row] @ keys.T).relu().sum(0)
            for block in scores.topk(min(BUDGET // RATIO, whole)).indices.tolist():
                seen[row, block * RATIO : (block + 1) * RATIO] = True
    return seen


def _mixture(x, weights, config):
    name = "layers.0.mlp."
    scores = (x @ weights[name + "gate"].T).softmax(-1)
    shares, chosen = scores.topk(config.num_experts_per_tok)
    shares = shares / shares.sum(-1, keepdim=True)
    gate, up, down = (weights[f"{name}shared_expert.{part}_proj"].T for part in ("gate", "up", "down"))
    out = torch.sigmoid(x @ weights[name + "shared_expert_gate"].T) * ((F.silu(x @ gate) * (x @ up)) @ down)
    for row in range(len(x)):
        for expert, share in zip(chosen[row].tolist(), shares[row], strict=True):
            gate, up = weights[name + "experts.gate_up_proj"][expert].chunk(2)
            out[row] += share * (weights[name + "experts.down_proj"][expert] @ (F.silu(gate @ x[row]) * (up @ x[row])))
    return out


CASES = [
    Case("qwen4_exp", "qwen4_exp", build, published, drafts, config, crop=False),
    Case("qwen4_exp", "qwen4_exp-vision-ngrams", wrapped, published, drafts, config, crop=False),
]
