"""MiniMax-M3: a text model, often inside one that sees images, whose sparse layers choose blocks of keys for each group of heads.

Tiny targets have blocks of 4 keys, of which a query reads its own and one other.
"""

from functools import partial

import torch
import torch.nn.functional as F
from transformers import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLConfig,
    MiniMaxM3VLForCausalLM,
    MiniMaxM3VLTextConfig,
)

from tests import tiny
from tests.families.layouts import Layout
from tests.families.twins import chosen_experts, heads, mixture, rms_norm, rotated_halves
from tests.families.zoo import Case
from tests.families.zoo.deepseek_v32 import calmed

NAMES = {"norm_embed": "enorm", "norm_hidden": "hnorm", "proj": "eh_proj", "norm_out": "final_layernorm"}
RENAMES = (
    ("mlp.gate.e_score_correction_bias", "block_sparse_moe.e_score_correction_bias"),
    ("mlp.", "block_sparse_moe."),
    ("indexer.", "index_"),
)
TEXT = tiny.DENSE | {
    "num_hidden_layers": 3,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 16,
    "dense_intermediate_size": 32,
    "shared_intermediate_size": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_block_size": 4,
    "index_topk_blocks": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def layout(prefix):
    return Layout(prefix + "transformer_layer.", {ours: prefix + theirs for ours, theirs in NAMES.items()}, renames=RENAMES)


WRAPPED, BARE = layout("language_model.model.mtp.layers.{i}."), layout("model.mtp.layers.{i}.")


def build():
    """As published: text and vision."""
    config = MiniMaxM3VLConfig(
        text_config=TEXT, vision_config=VISION, image_token_index=3, video_token_index=4, projector_hidden_size=16
    )
    return filled(MiniMaxM3SparseForConditionalGeneration(config))


def build_bare():
    return filled(MiniMaxM3VLForCausalLM(MiniMaxM3VLTextConfig(**TEXT)))


def filled(model):
    """A norm's weight is what it adds to one."""
    model = calmed(tiny.fill(model.eval(), seed=0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return model


def published(layout, head, model):
    """One matrix per expert, w1, w3 and w2; the shared expert's gate and up apart."""
    tensors = {}
    for name, tensor in layout.published(head, model).items():
        if "shared_experts.gate_up_proj" in name:
            halves = zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)
            tensors |= {name.replace("gate_up_proj", half): part.contiguous() for half, part in halves}
        elif ".experts." in name:
            numbers = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
            tensors[name.replace(name.split(".")[-2], numbers[name.split(".")[-2]])] = tensor
        else:
            tensors[name] = tensor
    return tensors


class Twin:
    """One of the head's layers, from published tensors."""

    def __init__(self, config, tensors, prefix):
        self.config = config
        self.weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    def linear(self, x, name):
        return F.linear(x, self.weights[f"{name}.weight"])

    def norm(self, x, name):
        return rms_norm(x, 1.0 + self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def block(self, embeds, hidden):
        x = self.linear(torch.cat([self.norm(embeds, "enorm"), self.norm(hidden, "hnorm")], dim=-1), "eh_proj")
        x = x + self.attention(self.norm(x, "transformer_layer.input_layernorm"))
        return x + self.experts(self.norm(x, "transformer_layer.post_attention_layernorm"))

    def heads(self, x, name, norm=None):
        """x (n, D) -> (H, n, d); where there is a norm: normed, and the first half rotated."""
        config, at = self.config, "transformer_layer.self_attn."
        each = heads(x, self.weights[f"{at}{name}.weight"], config.head_dim)
        if norm is None:
            return each
        turned, still = self.norm(each, at + norm).split(config.head_dim // 2, dim=-1)
        return torch.cat([rotated_halves(turned, config.rope_parameters["rope_theta"]), still], dim=-1)

    def attention(self, x):
        repeats = self.config.num_attention_heads // self.config.num_key_value_heads
        query, key, value = self.heads(x, "q_proj", "q_norm"), self.heads(x, "k_proj", "k_norm"), self.heads(x, "v_proj")
        key, value, seen = (each.repeat_interleave(repeats, 0) for each in (key, value, self.seen(x)))
        scores = (query @ key.mT * self.config.head_dim**-0.5).masked_fill(~seen, float("-inf"))
        return self.linear((scores.softmax(-1) @ value).transpose(0, 1).flatten(1), "transformer_layer.self_attn.o_proj")

    def seen(self, x):
        """(G, n, n) bool: of the blocks before a query's own, the one with the best-scored key, and its own up to itself."""
        size, best_of = self.config.index_block_size, self.config.index_topk_blocks - 1
        scores = self.heads(x, "index_q_proj", "index_q_norm") @ self.heads(x, "index_k_proj", "index_k_norm").mT
        seen = torch.zeros_like(scores, dtype=torch.bool)
        for group, rows in enumerate(scores):
            for row in range(len(x)):
                own = row // size
                earlier = rows[row, : own * size].view(own, size).amax(-1)
                for block in earlier.topk(min(best_of, own)).indices.tolist():
                    seen[group, row, block * size : (block + 1) * size] = True
                seen[group, row, own * size : row + 1] = True
        return seen

    def experts(self, x):
        config, at = self.config, "transformer_layer.block_sparse_moe."
        bias, gate = self.weights[at + "e_score_correction_bias"], self.weights[at + "gate.weight"]
        chosen, counts = chosen_experts(x, gate, bias, config.num_experts_per_tok, config.routed_scaling_factor)
        routed = mixture(x, chosen, counts, lambda expert, token: self.gated(token, f"{at}experts.{expert}.", "w1", "w3", "w2"))
        return routed + self.gated(x, at + "shared_experts.", "gate_proj", "up_proj", "down_proj")

    def gated(self, x, at, *names):
        gate, up, down = (at + name for name in names)
        gate, up, limit = self.linear(x, gate), self.linear(x, up), self.config.swiglu_limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return self.linear((up + 1.0) * gate * (gate * self.config.swiglu_alpha).sigmoid(), down)


@torch.no_grad()
def drafts(prefix, num_layers, target, tensors, text, num_steps):
    """Depth d sees the token d + 1 places ahead and what depth d - 1 put out, not normed; the last depth goes on by itself."""
    config, embed = target.config.get_text_config(), target.get_input_embeddings()
    layers = [Twin(config, tensors, prefix.format(i=index)) for index in range(num_layers)]
    hidden, tokens, logits = target.get_decoder()(torch.tensor([text[:-1]]), use_cache=False).last_hidden_state[0], text[1:], []
    for step in range(num_steps):
        layer = layers[min(step, num_layers - 1)]
        raw = layer.block(embed(torch.tensor(tokens)), hidden)
        logits.append(target.get_output_embeddings()(layer.norm(raw[-1], "final_layernorm")))
        drafted = int(logits[-1].argmax())
        is_chained = step + 1 < num_layers
        hidden = raw if is_chained else torch.cat([hidden, raw[-1:]])
        tokens = [*tokens[is_chained:], drafted]
    return torch.stack(logits)


def modules(number, settings):
    """The public config counts its modules in the text's part, next to a field of another meaning."""
    counts = {"num_mtp_modules": number, "num_nextn_predict_layers": 1}
    return settings | {"text_config": settings["text_config"] | counts} if "text_config" in settings else settings | counts


CASES = [
    Case(
        "minimax_m3_vl",
        "minimax_m3_vl",
        build,
        partial(published, WRAPPED),
        partial(drafts, "language_model.model.mtp.layers.{i}.", 1),
        partial(modules, 1),
    ),
    Case(
        "minimax_m3_vl",
        "minimax_m3_vl-text-2",
        build_bare,
        partial(published, BARE),
        partial(drafts, "model.mtp.layers.{i}.", 2),
        partial(modules, 2),
        num_layers=2,
    ),
]
