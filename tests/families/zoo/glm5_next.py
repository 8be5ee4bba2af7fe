"""GLM-5.3-Flash: Kimi delta attention and latent attention over pools of keys, in several residual streams; the head has one.

The head is a layer of latent attention whose indexer picks pools of keys, without positions, and a mixture of experts.
"""

import torch
import torch.nn.functional as F
from transformers import Glm5NextConfig, Glm5NextForConditionalGeneration

from tests import tiny
from tests.families.layouts import deepseek_layout
from tests.families.twins import calmed, chosen_experts, gated_mlp, heads, mixture, recurrent_drafts, rms_norm
from tests.families.zoo import Case

PREFIX = "model.language_model.layers.{n}."
LAYOUT = deepseek_layout(PREFIX)
KPOOL, TOPK = 3, 6
TEXT = {
    "hidden_size": tiny.SIZE,
    "vocab_size": tiny.VOCAB,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 0,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": TOPK,
    "index_kpool": KPOOL,
    "index_head_dim": 8,
    "index_n_heads": 16,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_lower_bound": -1.0,
    "swiglu_limit": 0.8,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
    "max_position_embeddings": 256,
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
}
VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "image_size": 28, "patch_size": 14, "out_hidden_size": tiny.SIZE} | {
    "intermediate_size": 16,
    "projection_intermediate_size": 16,
}
ENDS = ("", ".bias")
TOKENS = ("image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id", "video_start_token_id")


def build(seed=0, calm=1.0, **changes):
    ids = dict.fromkeys((*TOKENS, "video_end_token_id"), tiny.VOCAB - 1)
    config = Glm5NextConfig(text_config=TEXT | changes, vision_config=VISION, **ids)
    return calmed(tiny.fill(Glm5NextForConditionalGeneration(config).eval(), seed), calm)


def config(settings):
    """The published config.json counts the MTP layers of the text model."""
    return settings | {"text_config": settings["text_config"] | {"num_nextn_predict_layers": 1}}


def drafts(model, tensors, text, num_steps):
    config, prefix = model.config.text_config, PREFIX.format(n=model.config.text_config.num_hidden_layers)
    part = {name.removeprefix(prefix).removesuffix(".weight"): tensor for name, tensor in tensors.items()}

    def norm(x, name):
        return rms_norm(x, part[name], config.rms_norm_eps)

    def pooled(x):
        """The indexer's keys, a weighted mean of every KPOOL neighbours, feature by feature; what is left over has none."""
        keys = F.layer_norm(
            F.linear(x, part["self_attn.indexer.wk"]), (8,), *(part[f"self_attn.indexer.k_norm{end}"] for end in ENDS)
        )
        gates = F.linear(x, part["self_attn.indexer.index_kpool_compress_gate"])
        whole = len(x) // KPOOL
        keys, gates = (each[: whole * KPOOL].unflatten(0, (whole, KPOOL)) for each in (keys, gates))
        return ((gates + part["self_attn.indexer.index_kpool_compress_ape"]).softmax(1) * keys).sum(1)

    def picked(x, low_rank):
        """-> (n, n) bool: which tokens every token sees: the best pools that end before it, and what follows the last pool."""
        queries = heads(low_rank, part["self_attn.indexer.wq_b"], 8)
        counts = F.linear(x, part["self_attn.indexer.weights_proj"]) * config.index_n_heads**-0.5
        scores = (F.relu(queries @ pooled(x).T * 8**-0.5) * counts.T[..., None]).sum(0)
        seen = torch.zeros(len(x), len(x), dtype=torch.bool)
        for row in range(len(x)):
            whole = (row + 1) // KPOOL
            for pool in scores[row, :whole].topk(min(TOPK // KPOOL, whole)).indices.tolist():
                seen[row, pool * KPOOL : (pool + 1) * KPOOL] = True
            seen[row, whole * KPOOL : row + 1] = True
        return seen

    def attention(x):
        low_rank = norm(F.linear(x, part["self_attn.q_a_proj"]), "self_attn.q_a_layernorm")
        query = heads(low_rank, part["self_attn.q_b_proj"], 8)
        latent = norm(F.linear(x, part["self_attn.kv_a_proj_with_mqa"]), "self_attn.kv_a_layernorm")
        key, value = heads(latent, part["self_attn.kv_b_proj"], 16).split([8, 8], -1)
        scores = (query @ key.transpose(-1, -2) * 8**-0.5).masked_fill(~picked(x, low_rank), float("-inf"))
        return F.linear((scores.softmax(-1) @ value).transpose(0, 1).flatten(1), part["self_attn.o_proj"])

    def experts(x):
        routing = chosen_experts(
            x,
            part["mlp.gate"],
            part["mlp.gate.e_score_correction_bias"],
            config.num_experts_per_tok,
            config.routed_scaling_factor,
        )
        limit = config.swiglu_limit
        routed = mixture(x, *routing, lambda number, token: gated_mlp(token, part, f"mlp.experts.{number}", limit))
        return routed + gated_mlp(x, part, "mlp.shared_experts", limit)

    def head(embeds, hidden):
        x = F.linear(torch.cat([norm(embeds, "enorm"), norm(hidden, "hnorm")], -1), part["eh_proj"])
        x = x + attention(norm(x, "input_layernorm"))
        x = x + experts(norm(x, "post_attention_layernorm"))
        return norm(x, "shared_head.norm")

    def states(ids):
        return model.model.language_model(ids).last_hidden_state[0]

    return recurrent_drafts(model, states, head, text, num_steps)


def case(name, **changes):
    return Case(
        "glm5_next", f"glm5_next-{name}", lambda: build(**changes), LAYOUT.published, drafts, config, crop=False, num_rows=200
    )


CASES = [
    case("every_indexer"),
    case(
        "shared_indexer",
        seed=1,
        layer_types=["linear_attention", "full_attention", "full_attention", "linear_attention"],
        indexer_types=["full", "full", "shared", "full"],
        linear_lower_bound=None,
    ),
]
