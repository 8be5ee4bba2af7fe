"""GLM-OCR: the text part of a multimodal model, with norms on both sides of attention and MLP; gate and up joined or apart."""

import torch
import torch.nn.functional as F
from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

from tests import tiny
from tests.families.layouts import below, deepseek_layout
from tests.families.twins import causal_attention, heads, rms_norm, rotated
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


@torch.no_grad()
def drafts(model, tensors, text, num_steps, recycle="normed"):
    """Attention and MLP each stand between two norms; in text, the three axes of positions are one and the same."""
    config, named = model.config.text_config, below(tensors, "model.language_model.layers.2.")
    part = {name.removesuffix(".weight"): tensor for name, tensor in named.items()}

    def norm(x, name):
        return rms_norm(x, part[name], config.rms_norm_eps)

    def attention(x):
        query, key, value = (heads(x, part[f"self_attn.{name}_proj"], 8) for name in "qkv")
        seen = causal_attention(rotated(query, 10000.0), rotated(key, 10000.0), value, 8**-0.5)
        return F.linear(seen, part["self_attn.o_proj"])

    def mlp(x):
        gate, up = F.linear(x, part["mlp.gate_up_proj"]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, part["mlp.down_proj"])

    hidden = model.model.language_model(torch.tensor([text[:-1]]), use_cache=False).last_hidden_state[0]
    tokens, logits = list(text[1:]), []
    for _ in range(num_steps):
        embeds = model.model.language_model.embed_tokens(torch.tensor(tokens))
        x = F.linear(torch.cat([norm(embeds, "enorm"), norm(hidden, "hnorm")], -1), part["eh_proj"])
        x = x + norm(attention(norm(x, "input_layernorm")), "post_self_attn_layernorm")
        x = x + norm(mlp(norm(x, "post_attention_layernorm")), "post_mlp_layernorm")
        normed = norm(x, "shared_head.norm")[-1:]
        logits.append(model.lm_head(normed)[0])
        hidden = torch.cat([hidden, normed if recycle == "normed" else x[-1:]])
        tokens.append(int(logits[-1].argmax()))
    return torch.stack(logits)


CASES = [Case("glm_ocr", "glm_ocr", build, LAYOUT.published, drafts, published_config)]
