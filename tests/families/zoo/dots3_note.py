"""dots3-note: layers that choose their keys and layers that slide, with heads of other sizes. The MTP layer slides, is dense, and
has an embedding table of its own, which lies outside the layer.
"""

from functools import partial

import torch
import torch.nn.functional as F
import transformers

from tests import tiny
from tests.families.layouts import deepseek_layout
from tests.families.twins import heads, recurrent_drafts, rms_norm, rotated
from tests.families.zoo import Case, one_layer
from tests.families.zoo.deepseek_v32 import INDEXER, calmed, states

SKIP = "" if hasattr(transformers, "Dots3NoteForCausalLM") else "this transformers has no dots3_note"
LAYOUT = deepseek_layout(copies=("model.layers.{n}.shared_head.head.weight",))
TABLE = "model.mtp.embed_tokens.weight"
SETTINGS = (
    tiny.MIXTURE
    | tiny.LATENT
    | INDEXER
    | {
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "sliding_window": 8,
        "shared_experts_intermediate_size": 16,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 12,
        "swa_kv_lora_rank": 12,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 10,
    }
)


def build():
    config = transformers.Dots3NoteTextConfig(**SETTINGS)
    return calmed(tiny.fill(transformers.Dots3NoteForCausalLM(config).eval(), seed=0))


def published(head, model):
    return LAYOUT.published(head, model) | {TABLE: head.layers[0].embedding.weight.detach().clone()}


def as_published(settings):
    """The text model's settings at the top, beside those of what sees and hears, whose width they must match."""
    senses = {"vision_config": {"adapter_out_dim": tiny.SIZE}, "audio_config": {"adapter_out_dim": tiny.SIZE}}
    return one_layer(settings) | senses | {"model_type": "dots3_note", "mtp_layer_types": ["sliding_attention"]}


class Twin:
    """The head from published tensors: latent attention with a gate per head, over the last few rows."""

    def __init__(self, target, tensors):
        config = target.config
        prefix = f"model.layers.{config.num_hidden_layers}."
        self.weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        self.eps, self.size = config.rms_norm_eps, config.hidden_size
        self.window, self.base = config.sliding_window, config.rope_parameters["sliding_attention"]["rope_theta"]

    def linear(self, x, name):
        return F.linear(x, self.weights[f"{name}.weight"])

    def norm(self, x, name):
        return rms_norm(x, self.weights[f"{name}.weight"], self.eps)

    def head(self, embeds, hidden):
        x = self.linear(torch.cat([self.norm(embeds, "enorm"), self.norm(hidden, "hnorm")], dim=-1), "eh_proj")
        x = x + self.attention(self.norm(x, "input_layernorm"))
        y = self.norm(x, "post_attention_layernorm")
        x = x + self.linear(F.silu(self.linear(y, "mlp.gate_proj")) * self.linear(y, "mlp.up_proj"), "mlp.down_proj")
        return self.norm(x, "shared_head.norm")

    def attention(self, x):
        rank, plain = SETTINGS["swa_kv_lora_rank"], SETTINGS["swa_qk_nope_head_dim"]
        rope = SETTINGS["swa_head_dim"] - plain
        latent = self.norm(self.linear(x, "self_attn.q_a_proj"), "self_attn.q_a_layernorm")
        latent = latent * (self.size / SETTINGS["swa_q_lora_rank"]) ** 0.5
        query, query_rope = heads(latent, self.weights["self_attn.q_b_proj.weight"], plain + rope).split([plain, rope], dim=-1)
        squeezed, key_rope = self.linear(x, "self_attn.kv_a_proj_with_mqa").split([rank, rope], dim=-1)
        squeezed = self.norm(squeezed, "self_attn.kv_a_layernorm") * (self.size / rank) ** 0.5
        key_rope = self.norm(key_rope, "self_attn.k_rope_only_layernorm")[None]
        both = heads(squeezed, self.weights["self_attn.kv_b_proj.weight"], plain + SETTINGS["swa_v_head_dim"])
        key, value = both.split([plain, SETTINGS["swa_v_head_dim"]], dim=-1)
        scores = query @ key.mT + rotated(query_rope, self.base) @ rotated(key_rope, self.base).mT
        distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
        unseen = (distance < 0) | (distance >= self.window)
        law = (scores * (plain + rope) ** -0.5).masked_fill(unseen, float("-inf")).softmax(-1)
        gates = self.linear(x, "self_attn.g_proj").sigmoid().T[..., None]
        return self.linear((law @ value * gates).transpose(0, 1).flatten(1), "self_attn.o_proj")


class OwnTable:
    """The target, with the head's own embedding table."""

    def __init__(self, target, table):
        self.get_output_embeddings = target.get_output_embeddings
        self.get_input_embeddings = lambda: lambda tokens: table[tokens]


def drafts(target, tensors, text, num_steps):
    return recurrent_drafts(
        OwnTable(target, tensors[TABLE]), partial(states, target), Twin(target, tensors).head, text, num_steps
    )


CASES = [Case("dots3_note", "dots3_note", build, published, drafts, as_published, skip=SKIP)]
