"""GLM-OCR: the text part of a multimodal model, with norms on both sides of attention and MLP; gate and up joined or apart."""

import torch
import torch.nn.functional as F
from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

from tests import tiny
from tests.families.layouts import below, deepseek_layout
from tests.families.twins import causal_attention, heads, rms_norm
from tests.families.zoo import Case

LAYOUT = deepseek_layout("model.language_model.layers.{n}.")
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
TEXT = tiny.DENSE | {"rope_parameters": ROPE, "head_dim": 8}
VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": tiny.SIZE, "intermediate_size": 16}
TOKENS = ("image", "video", "image_start", "image_end", "video_start", "video_end")


def build():
    tokens = {f"{name}_token_id": tiny.VOCAB - 6 + number for number, name in enumerate(TOKENS)}
    config = GlmOcrConfig(text_config=TEXT, vision_config=VISION | {"patch_size": 4, "image_size": 16}, **tokens)
    return tiny.fill(GlmOcrForConditionalGeneration(config).eval(), seed=5)


def published_config(settings):
    """The count of MTP layers lies where the text part is described."""
    return settings | {"text_config": settings["text_config"] | {"num_nextn_predict_layers": 1}}


def turned(x, axes):
    """x (H, n, 8), axes (3, n): of its four pairs of neighbours the first turns with time, the second with height, the rest with
    width."""
    turns = axes[[0, 1, 2, 2]].T * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * turns.cos() - odd * turns.sin(), odd * turns.cos() + even * turns.sin()], -1).flatten(-2)


@torch.no_grad()
def read(model, ids, media):
    """The text part's own view of a prompt ids (1, n): embeddings (n, D), hidden states (n, D), positions (3, n)."""
    seen, part = {}, model.model.language_model
    handle = part.register_forward_hook(lambda _, __, given, output: seen.update(given, states=output[0]), with_kwargs=True)
    model(ids, use_cache=False, **media)
    handle.remove()
    plain = torch.arange(ids.shape[1]).expand(3, 1, -1)
    axes = plain if seen["position_ids"] is None else seen["position_ids"][-3:]
    return seen["inputs_embeds"][0], seen["states"][0], axes[:, 0]


@torch.no_grad()
def drafts(model, tensors, text, num_steps, recycle="normed", media=None):
    """Attention and MLP each stand between two norms. Rows stand where the target's hidden states do; in text, all axes agree."""
    given, states, axes = read(model, torch.tensor([text]), media or {})
    hidden, axes, embeds = states[:-1], axes[:, :-1], given[1:]
    config, named = model.config.text_config, below(tensors, "model.language_model.layers.2.")
    part = {name.removesuffix(".weight"): tensor for name, tensor in named.items()}

    def norm(x, name):
        return rms_norm(x, part[name], config.rms_norm_eps)

    def attention(x):
        beyond = torch.arange(1, 1 + len(x) - axes.shape[1]) + axes.max()
        where = torch.cat([axes, beyond.expand(3, -1)], dim=1)
        query, key, value = (heads(x, part[f"self_attn.{name}_proj"], 8) for name in "qkv")
        seen = causal_attention(turned(query, where), turned(key, where), value, 8**-0.5)
        return F.linear(seen, part["self_attn.o_proj"])

    def mlp(x):
        gate, up = F.linear(x, part["mlp.gate_up_proj"]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, part["mlp.down_proj"])

    logits = []
    for _ in range(num_steps):
        x = F.linear(torch.cat([norm(embeds, "enorm"), norm(hidden, "hnorm")], -1), part["eh_proj"])
        x = x + norm(attention(norm(x, "input_layernorm")), "post_self_attn_layernorm")
        x = x + norm(mlp(norm(x, "post_attention_layernorm")), "post_mlp_layernorm")
        normed = norm(x, "shared_head.norm")[-1:]
        logits.append(model.lm_head(normed)[0])
        hidden = torch.cat([hidden, normed if recycle == "normed" else x[-1:]])
        embeds = torch.cat([embeds, model.get_input_embeddings()(logits[-1].argmax()[None])])
    return torch.stack(logits)


CASES = [Case("glm_ocr", "glm_ocr", build, LAYOUT.published, drafts, published_config)]
