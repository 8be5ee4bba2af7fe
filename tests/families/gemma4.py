"""Tiny Gemma 4 targets, their assistants as published, and what an assistant computes, written out in plain torch."""

import json
import math
from functools import cache
from inspect import signature

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import (
    DynamicCache,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
)

from tests import tiny

SLIDING, FULL, WINDOW, VOCAB, SIZE = "sliding_attention", "full_attention", 32, 48, 32
IMAGE, NUM_SOFT_TOKENS, PATCH = tiny.BOS, 9, 2
OUTER = {"image_token_id": IMAGE, "video_token_id": -2, "audio_token_id": -3, "boi_token_id": 6, "eoi_token_id": 7}
OUTER |= {"tie_word_embeddings": False}

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": SIZE,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": WINDOW,
    "max_position_embeddings": 512,
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
    "tie_word_embeddings": False,
}
SHARING = {
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
    "use_double_wide_mlp": True,
}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
ALIKE = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL, SLIDING, FULL], "final_logit_softcapping": 4.0}
KEYS_ARE_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": PATCH,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}
AUDIO = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [128, 4],
    "output_proj_dims": 16,
    "conv_kernel_size": 3,
}
SOUND = 5
UNIFIED_VISION = {
    "patch_size": PATCH,
    "pooling_kernel_size": 1,
    "mm_embed_dim": SIZE,
    "output_proj_dims": SIZE,
    "mm_posemb_size": 16,
}

NAMES = ("e2b", "e2b_images", "moe", "unified")
SEEDS = {"e2b": 1, "e2b_images": 1, "moe": 3, "unified": 0}
PRODUCERS = {"e2b": {SLIDING: 2, FULL: 1}, "moe": {SLIDING: 2, FULL: 3}}
"""The last layer of each type with keys of its own, as one counts them in the lists above."""


def build(name, **changes):
    """A new target: with embeddings per layer and layers that read the keys of others; with experts; without an image encoder."""
    if name == "e2b":
        model = Gemma4ForCausalLM(Gemma4TextConfig(**TEXT | SHARING | PER_LAYER | changes))
    elif name == "e2b_images":
        text = Gemma4TextConfig(**TEXT | SHARING | PER_LAYER | changes)
        model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=VISION, **OUTER))
    elif name == "moe":
        settings = TEXT | ALIKE | KEYS_ARE_VALUES | EXPERTS | {"hidden_size_per_layer_input": 0} | changes
        text = Gemma4TextConfig(**settings, use_bidirectional_attention="vision")
        model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=VISION, **OUTER))
    else:
        text = Gemma4UnifiedTextConfig(**TEXT | ALIKE | KEYS_ARE_VALUES | changes, use_bidirectional_attention="vision")
        config = Gemma4UnifiedConfig(text_config=text, vision_config=UNIFIED_VISION, **OUTER)
        model = Gemma4UnifiedForConditionalGeneration(config)
    tiny.fill(model.eval(), SEEDS[name])
    with torch.no_grad():
        model.get_input_embeddings().weight *= 0.65  # not all of its size, for it is multiplied when looked up: text that strays
    return model


@cache
def target(name):
    """The one target of a name that all tests share: to be left as it was."""
    return build(name)


def images(name, number, seed=0):
    """What a processor makes of so many pictures, of which each becomes NUM_SOFT_TOKENS tokens."""
    generator = torch.Generator().manual_seed(seed)
    side = 3 if name == "unified" else 3 * VISION["pooling_kernel_size"]
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), dim=-1).view(1, -1, 2)
    pixels = torch.rand(number, side * side, 3 * PATCH * PATCH, generator=generator)
    return {"pixel_values": pixels, "image_position_ids": grid.expand(number, -1, -1).contiguous()}


def videos():
    """Two videos of two frames each, as the installed transformers wants them."""
    frames = images("e2b_images", 4)
    pixels, places = frames["pixel_values"], frames["image_position_ids"]
    if "num_frames_per_video" in signature(Gemma4ForConditionalGeneration.forward).parameters:
        return {"pixel_values_videos": pixels, "video_position_ids": places, "num_frames_per_video": torch.tensor([2, 2])}
    return {"pixel_values_videos": pixels.unflatten(0, (2, 2)), "video_position_ids": places.unflatten(0, (2, 2))}


def sounds(number, length):
    """So many spectrograms, each of which becomes length / 4 tokens."""
    features = torch.rand(number, length, 128, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "input_features_mask": torch.ones(number, length, dtype=torch.bool)}


def build_hearing():
    """A target with an encoder for sounds besides, in which the tokens of a video's frame see each other."""
    text = Gemma4TextConfig(**TEXT | SHARING | PER_LAYER, use_bidirectional_attention="vision")
    ids = OUTER | {"video_token_id": tiny.EOS, "audio_token_id": SOUND}
    model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=VISION, audio_config=AUDIO, **ids)).eval()
    tiny.fill(model, 1)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 0.65
    return model


# ── assistants as published ─────────────────────────────────────────────────────────────────────────────────────────────────


def config_of(name, **changes):
    """The config.json of an assistant: two layers narrower than the target, without keys of their own."""
    like = {key: value for key, value in TEXT.items() if "head" in key or key in ("vocab_size", "sliding_window")}
    own = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
    kind = "gemma4_unified" if name == "unified" else "gemma4"
    text = like | own | {"num_kv_shared_layers": 2, "max_position_embeddings": 512, "model_type": f"{kind}_text"}
    text |= KEYS_ARE_VALUES if name in ("moe", "unified") else {}
    text |= {} if name == "unified" else {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    text |= {"final_logit_softcapping": 4.0} if name == "moe" else {}
    ordered = {"use_ordered_embeddings": True, "num_centroids": 12, "centroid_intermediate_top_k": 5}
    whole = {"model_type": f"{kind}_assistant", "backbone_hidden_size": SIZE, "text_config": text, "tie_word_embeddings": True}
    return whole | (ordered if name.startswith("e2b") else {"use_ordered_embeddings": False}) | changes


def published(name, seed=0):
    """An assistant's tensors under their real names. It is right about every other time: it sees through a projection onto fewer
    numbers what the target's output layer would make of the last token and a little of the state before it."""
    generator = torch.Generator().manual_seed(seed)
    model, text = target(name), config_of(name)["text_config"]
    size, inner, num_heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    narrow = torch.linalg.qr(normal(SIZE, size))[0].T
    output = model.get_output_embeddings().weight.detach()
    tensors = {
        "pre_projection.weight": torch.cat([narrow / math.sqrt(SIZE), 0.3 * narrow], dim=1),
        "post_projection.weight": narrow.T + normal(SIZE, size, scale=0.02),
        "model.embed_tokens.weight": output @ narrow.T,
        "model.norm.weight": 1 + normal(size, scale=0.1),
    }
    for index, kind in enumerate(text["layer_types"]):
        width = text["head_dim"] if kind == SLIDING else text["global_head_dim"]
        shapes = {
            "self_attn.q_proj": (num_heads * width, size),
            "self_attn.o_proj": (size, num_heads * width),
            "mlp.gate_proj": (inner, size),
            "mlp.up_proj": (inner, size),
            "mlp.down_proj": (size, inner),
        }
        layer = {name: normal(*shape, scale=shape[1] ** -0.5) for name, shape in shapes.items()}
        layer["self_attn.q_norm"] = 1 + normal(width, scale=0.2)
        for norm, weight in (("input_layernorm", 1), ("pre_feedforward_layernorm", 1)):
            layer[norm] = weight + normal(size, scale=0.2)
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            layer[norm] = 0.2 + normal(size, scale=0.05)
        tensors |= {f"model.layers.{index}.{part}.weight": tensor for part, tensor in layer.items()}
        tensors[f"model.layers.{index}.layer_scalar"] = torch.tensor([0.8])
    if config_of(name)["use_ordered_embeddings"]:
        order = torch.randperm(VOCAB, generator=generator)
        groups = tensors["model.embed_tokens.weight"][order].view(config_of(name)["num_centroids"], -1, size)
        tensors["masked_embedding.token_ordering"] = order
        tensors["masked_embedding.centroids.weight"] = groups.mean(1)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write(folder, name, changed=lambda tensors: tensors, generation=None, **changes):
    """An assistant's checkpoint; changed: what becomes of its tensors, changes: of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(changed(published(name)), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_of(name, **changes), indent=2))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


# ── the twin ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Twin:
    """An assistant in plain torch, from its published tensors and config."""

    def __init__(self, name, model=None, window=WINDOW):
        self.model, self.window = model or target(name), window
        self.config, self.tensors = config_of(name), published(name)
        self.text = self.config["text_config"]
        self.producers = PRODUCERS["e2b" if name.startswith("e2b") else "moe"]

    def __getitem__(self, name):
        return self.tensors[name]

    def read(self, text, **prompt):
        """What the target makes of all but the last token: keys by layer type (H, n, Dh), its last hidden state (D,)."""
        held, kept = DynamicCache(), []
        hook = self.model.get_decoder().norm.register_forward_hook(lambda _, inputs, output: kept.append(output))
        self.model(torch.tensor([text[:-1]]), **{tiny.CACHE: held}, use_cache=True, **prompt)
        hook.remove()
        keys = {kind: (held.layers[i].keys[0], held.layers[i].values[0]) for kind, i in self.producers.items()}
        return keys, kept[0][0, -1]

    @torch.no_grad()
    def drafts(self, text, num_steps, **prompt):
        """The logits (num_steps, V) of the drafts behind a text, -inf where the assistant scores nothing."""
        keys, hidden = self.read(text, **prompt)
        token, logits = torch.tensor(text[-1]), []
        for _ in range(num_steps):
            z = self.state(torch.cat([self.model.get_input_embeddings()(token), hidden]), keys, len(text) - 2)
            logits.append(self.scored(z))
            hidden, token = self["post_projection.weight"] @ z, logits[-1].argmax()
        return torch.stack(logits)

    def state(self, pair, keys, position):
        """(2 D,) -> (Hd,), one query at a position over the keys up to it."""
        x = self["pre_projection.weight"] @ pair
        for index, kind in enumerate(self.text["layer_types"]):
            part = f"model.layers.{index}."
            looked = self.attention(self.normed(x, part + "input_layernorm"), part + "self_attn.", kind, keys[kind], position)
            x = x + self.normed(looked, part + "post_attention_layernorm")
            y = self.normed(x, part + "pre_feedforward_layernorm")
            y = F.gelu(self[part + "mlp.gate_proj.weight"] @ y, approximate="tanh") * (self[part + "mlp.up_proj.weight"] @ y)
            x = x + self.normed(self[part + "mlp.down_proj.weight"] @ y, part + "post_feedforward_layernorm")
            x = x * self[part + "layer_scalar"]
        return self.normed(x, "model.norm")

    def attention(self, x, part, kind, pair, position):
        keys, values = pair
        first = max(0, position + 1 - self.window) if kind == SLIDING else 0
        query = self.normed((self[part + "q_proj.weight"] @ x).view(self.text["num_attention_heads"], -1), part + "q_norm")
        groups = len(query) // len(keys)
        looked = []
        for head, q in enumerate(rotated(query, position, kind)):
            law = (keys[head // groups, first : position + 1] @ q).softmax(0)
            looked.append(law @ values[head // groups, first : position + 1])
        return self[part + "o_proj.weight"] @ torch.cat(looked)

    def normed(self, x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self[name + ".weight"]

    def scored(self, z):
        logits = self["model.embed_tokens.weight"] @ z
        cap = self.text.get("final_logit_softcapping")
        logits = cap * (logits / cap).tanh() if cap else logits
        if not self.config["use_ordered_embeddings"]:
            return logits
        best = (self["masked_embedding.centroids.weight"] @ z).topk(self.config["centroid_intermediate_top_k"]).indices
        shown = self["masked_embedding.token_ordering"].view(self.config["num_centroids"], -1)[best].flatten()
        return torch.full((VOCAB,), float("-inf")).index_copy(0, shown, logits[shown])


def rotated(query, position, kind):
    """query (H, Dh) -> turned by its position: all of it at base 1e4 in sliding layers, a quarter at base 1e6 in full ones."""
    width = query.shape[-1]
    turning = width // 2 if kind == SLIDING else width // 8
    speeds = torch.tensor([(10000.0 if kind == SLIDING else 1000000.0) ** (-2 * i / width) for i in range(turning)])
    angles = position * torch.cat([speeds, torch.zeros(width // 2 - turning)])
    left, right = query.chunk(2, dim=-1)
    return torch.cat([left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], dim=-1)
