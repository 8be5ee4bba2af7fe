"""Qwen3.5: gated delta networks and, every few layers, gated full attention; dense, tied or not, and as published with vision.

The head's block is full attention, and lies under `mtp.` beside a base that lies under `model.language_model.`.
"""

from functools import partial

import torch
import torch.nn.functional as F
from transformers import Qwen3_5Config, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration, Qwen3_5TextConfig

from tests import tiny
from tests.families.layouts import qwen_layout
from tests.families.twins import causal_attention, gated_mlp, heads, recurrent_drafts, rms_norm, rotated_halves
from tests.families.zoo import Case

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
SETTINGS = tiny.DENSE | LINEAR | {"rope_parameters": MROPE}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": tiny.SIZE,
    "num_position_embeddings": 16,
    "patch_size": 4,
}
LAYOUT = qwen_layout()


def centred(model):
    """Norms of this family scale by 1 + w, and `tiny.fill` takes them for norms that scale by w."""
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.weight -= 1
    return model


def build(seed=0, **changes):
    return centred(tiny.fill(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**(SETTINGS | changes))).eval(), seed))


def tied():
    """A tied output layer cannot lean towards a circle by itself: the last MLP looks the follower up, a neuron a token."""
    model, generator = build(tie_word_embeddings=True), torch.Generator().manual_seed(0)
    table, mlp = model.get_input_embeddings().weight, model.model.layers[-1].mlp
    with torch.no_grad():
        table.copy_(torch.randn(table.shape, generator=generator))
        circle = torch.randperm(tiny.VOCAB - 3, generator=generator) + 3
        follower = torch.arange(tiny.VOCAB)
        follower[circle] = circle.roll(-1)
        for name, weight in model.model.layers.named_parameters():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                weight *= 0.7
        mlp.down_proj.weight[:, : tiny.VOCAB] = 0.3 * table[follower].T
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight[: tiny.VOCAB] = table * tiny.SIZE**-0.5
    return model


def wrapped(seed=0):
    """The class that reads images too, around the same text model."""
    config = Qwen3_5Config(text_config=SETTINGS, vision_config=VISION, image_token_id=3, video_token_id=4)
    return centred(tiny.fill(Qwen3_5ForConditionalGeneration(config).eval(), seed))


def published_config(settings):
    """The number of MTP layers, where the published config.json has it: beside the other settings of the text model."""
    settings.get("text_config", settings).update(mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False)
    return settings


# ── the twin ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def attention(x, part, settings, norm):
    """x (n, D) -> (n, D). A head's query comes with a gate for what it fetches; the first part of a head is rotated."""
    size, rope = settings.head_dim, settings.rope_parameters
    turned = int(size * rope["partial_rotary_factor"])

    def rotated(states, name):
        states = norm(states, f"self_attn.{name}_norm")
        return torch.cat([rotated_halves(states[..., :turned], rope["rope_theta"]), states[..., turned:]], dim=-1)

    query, gate = heads(x, part["self_attn.q_proj"], 2 * size).chunk(2, dim=-1)
    key, value = (heads(x, part[f"self_attn.{name}_proj"], size) for name in "kv")
    fetched = causal_attention(rotated(query, "q"), rotated(key, "k"), value, size**-0.5)
    return F.linear(fetched * gate.transpose(0, 1).flatten(1).sigmoid(), part["self_attn.o_proj"])


dense = partial(gated_mlp, at="mlp")


def drafts(model, tensors, text, num_steps, mlp=dense):
    """mlp: (x (n, D), the block's tensors) -> (n, D)."""
    settings = model.config.get_text_config()
    whole = {name.removeprefix("mtp.").removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    part = {name.removeprefix("layers.0."): tensor for name, tensor in whole.items()}

    def norm(x, name):
        return rms_norm(x, 1 + part[name], settings.rms_norm_eps)

    def head(embeds, hidden):
        pair = [norm(embeds, "pre_fc_norm_embedding"), norm(hidden, "pre_fc_norm_hidden")]
        x = F.linear(torch.cat(pair, dim=-1), part["fc"])
        x = x + attention(norm(x, "input_layernorm"), part, settings, norm)
        x = x + mlp(norm(x, "post_attention_layernorm"), part)
        return norm(x, "norm")

    def states(ids):
        return model.get_decoder()(ids, use_cache=False).last_hidden_state[0]

    return recurrent_drafts(model, states, head, text, num_steps)


CASE = partial(
    Case,
    "qwen3_5",
    published=LAYOUT.published,
    drafts=drafts,
    config=published_config,
    crop=False,
)
CASES = [CASE("qwen3_5", build), CASE("qwen3_5-tied", tied), CASE("qwen3_5-vision", wrapped)]
