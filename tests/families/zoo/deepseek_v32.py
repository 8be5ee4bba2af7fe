"""DeepSeek-V3.2: DeepSeek-V3 with an indexer in every layer, which chooses the few keys that a query attends to.

Tiny targets choose 4 keys, so that from the fifth token on the choice decides what is read.
"""

from functools import partial

import torch
import torch.nn.functional as F
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from tests import tiny
from tests.families.layouts import deepseek_layout
from tests.families.twins import chosen_experts, heads, mixture, recurrent_drafts, rms_norm, rotated, rotated_halves
from tests.families.zoo import Case

LAYOUT = deepseek_layout()
INDEXER = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 16}
SETTINGS = tiny.MIXTURE | tiny.LATENT | INDEXER | {"num_key_value_heads": 4}


def calmed(model):
    """The model, whose layers say less than they might: four keys of many make for so lively a text that no head would follow."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 0.6 if "o_proj" in name or "down_proj" in name else 1.0
    return model


def build():
    return calmed(tiny.fill(DeepseekV32ForCausalLM(DeepseekV32Config(**SETTINGS)).eval(), seed=2))


class Twin:
    """The head of a DeepSeek with an indexer, from published tensors.

    rotation  how the indexer rotates its queries and keys; the attention does it in pairs of neighbours
    num_kept  rows behind so many attend to what the last of those did; None: each row to what it chooses itself
    """

    def __init__(self, target, tensors, rotation, num_kept=None):
        self.config, self.rotation, self.num_kept = target.config, rotation, num_kept
        prefix = f"model.layers.{target.config.num_hidden_layers}."
        self.weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def linear(self, x, name):
        return F.linear(x, self.weights[f"{name}.weight"])

    def norm(self, x, name, eps=None):
        return rms_norm(x, self.weights[f"{name}.weight"], eps or self.config.rms_norm_eps)

    def head(self, embeds, hidden):
        x = self.linear(torch.cat([self.norm(embeds, "enorm"), self.norm(hidden, "hnorm")], dim=-1), "eh_proj")
        x = x + self.attention(self.norm(x, "input_layernorm"))
        return self.norm(x + self.experts(self.norm(x, "post_attention_layernorm")), "shared_head.norm")

    def attention(self, x):
        """Latent attention in which a query sees only the keys that were chosen for it. x (n, D)."""
        config, rope = self.config, self.config.qk_rope_head_dim
        latent = self.norm(self.linear(x, "self_attn.q_a_proj"), "self_attn.q_a_layernorm", eps=1e-6)
        query = heads(latent, self.weights["self_attn.q_b_proj.weight"], config.qk_nope_head_dim + rope)
        squeezed, key_rope = self.linear(x, "self_attn.kv_a_proj_with_mqa").split([config.kv_lora_rank, rope], dim=-1)
        squeezed = self.norm(squeezed, "self_attn.kv_a_layernorm", eps=1e-6)
        both = heads(squeezed, self.weights["self_attn.kv_b_proj.weight"], config.qk_nope_head_dim + config.v_head_dim)
        key, value = both.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        query_pass, query_rope = query.split([config.qk_nope_head_dim, rope], dim=-1)
        query_rope, key_rope = (rotated(z, config.rope_parameters["rope_theta"]) for z in (query_rope, key_rope[None]))
        scores = query_pass @ key.mT + query_rope @ key_rope.mT
        scores = scores * (config.qk_nope_head_dim + rope) ** -0.5
        law = scores.masked_fill(~self.chosen(x, latent), float("-inf")).softmax(-1)
        return self.linear((law @ value).transpose(0, 1).flatten(1), "self_attn.o_proj")

    def chosen(self, x, latent):
        """(n, n) bool: of the rows 0..j, the index_topk that row j scores best."""
        config, rope = self.config, self.config.qk_rope_head_dim
        query = heads(latent, self.weights["self_attn.indexer.wq_b.weight"], config.index_head_dim)
        norm = self.weights["self_attn.indexer.k_norm.weight"], self.weights["self_attn.indexer.k_norm.bias"]
        key = F.layer_norm(self.linear(x, "self_attn.indexer.wk"), [config.index_head_dim], *norm, eps=1e-6)
        base = config.rope_parameters["rope_theta"]
        query, key = (torch.cat([self.rotation(z[..., :rope], base), z[..., rope:]], dim=-1) for z in (query, key[None]))
        weights = self.linear(x, "self_attn.indexer.weights_proj")
        scores = (weights.T[..., None] * (query @ key.mT).relu()).sum(0)
        mask = torch.zeros(len(x), len(x), dtype=torch.bool)
        for row in range(len(x)):
            mask[row, scores[row, : row + 1].topk(min(config.index_topk, row + 1)).indices] = True
        if self.num_kept is not None:
            mask[self.num_kept :] = mask[self.num_kept - 1]
        return mask

    def experts(self, x):
        config, weights = self.config, self.weights
        bias, scale = weights["mlp.gate.e_score_correction_bias"], config.routed_scaling_factor
        chosen, counts = chosen_experts(x, weights["mlp.gate.weight"], bias, config.num_experts_per_tok, scale)
        routed = mixture(x, chosen, counts, lambda expert, token: self.gated(token, f"mlp.experts.{expert}"))
        return routed + self.gated(x, "mlp.shared_experts")

    def gated(self, x, name):
        return self.linear(F.silu(self.linear(x, f"{name}.gate_proj")) * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj")


def states(model, ids):
    return model.model(ids, use_cache=False).last_hidden_state[0]


def drafts(rotation, target, tensors, text, num_steps, shares=False):
    twin = Twin(target, tensors, rotation, num_kept=len(text) - 1 if shares else None)
    return recurrent_drafts(target, partial(states, target), twin.head, text, num_steps)


CASES = [Case("deepseek_v32", "deepseek_v32", build, LAYOUT.published, partial(drafts, rotated_halves))]
