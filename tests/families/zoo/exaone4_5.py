"""EXAONE 4.5: K-EXAONE's head in a model that sees, around a layer that is normed behind attention and MLP instead of before."""

import torch
import torch.nn.functional as F
from transformers import Exaone4_5_Config, Exaone4_5_ForConditionalGeneration

from tests import tiny
from tests.families.twins import causal_attention, heads, recurrent_drafts, rms_norm, rotated_halves
from tests.families.zoo import Case

TEXT = tiny.DENSE | {
    "model_type": "exaone4",
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": tiny.WINDOW,
    "head_dim": 8,
}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_key_value_heads": 1,
    "out_hidden_size": tiny.SIZE,
    "fullatt_block_indexes": [0],
}
AROUND = {"norm_embed": "pre_fc_norm_embedding", "norm_hidden": "pre_fc_norm_hidden", "proj": "fc", "norm_out": "norm"}


def build(**changes):
    settings = {"text_config": TEXT | changes, "vision_config": VISION, "image_token_id": 46, "video_token_id": 47}
    special = {"pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS}
    model = tiny.fill(Exaone4_5_ForConditionalGeneration(Exaone4_5_Config(**settings, **special)).eval(), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:  # norms behind attention and MLP: a layer is not to drown what came before it
                parameter *= 0.45
    return model


def published(head, _model):
    """The text model lies under model.language_model, but the head on top: mtp.fc, mtp.layers.0 and so on."""
    tensors = {f"mtp.{name}.weight": getattr(head.layers[0], ours).weight for ours, name in AROUND.items()}
    tensors |= {f"mtp.layers.0.{name}": tensor for name, tensor in head.layers[0].block.state_dict().items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def config(settings):
    """The count is on top, and the text model has the name of its time."""
    text = settings["text_config"] | {"model_type": "exaone4_5_text"}
    return settings | {"num_nextn_predict_layers": 1, "text_config": text}


def drafts(model, tensors, text, num_steps):
    settings = model.config.text_config

    def norm(x, name):
        return rms_norm(x, tensors[f"mtp.{name}.weight"], settings.rms_norm_eps)

    def linear(x, name):
        return F.linear(x, tensors[f"mtp.{name}.weight"])

    def attention(x):
        names = {part: f"layers.0.self_attn.{part}_proj" for part in "qkvo"}
        query, key, value = (heads(x, tensors[f"mtp.{names[part]}.weight"], settings.head_dim) for part in "qkv")
        query, key = norm(query, "layers.0.self_attn.q_norm"), norm(key, "layers.0.self_attn.k_norm")
        theta = settings.rope_parameters["rope_theta"]
        seen = causal_attention(
            rotated_halves(query, theta), rotated_halves(key, theta), value, settings.head_dim**-0.5, settings.sliding_window
        )
        return linear(seen, names["o"])

    def mlp(x):
        gate, up = linear(x, "layers.0.mlp.gate_proj"), linear(x, "layers.0.mlp.up_proj")
        return linear(F.silu(gate) * up, "layers.0.mlp.down_proj")

    def head(embeds, hidden):
        pair = [norm(embeds, "pre_fc_norm_embedding"), norm(hidden, "pre_fc_norm_hidden")]
        x = linear(torch.cat(pair, dim=-1), "fc")
        x = x + norm(attention(x), "layers.0.post_attention_layernorm")
        x = x + norm(mlp(x), "layers.0.post_feedforward_layernorm")
        return norm(x, "norm")

    def states(ids):
        return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]

    return recurrent_drafts(model, states, head, text, num_steps)


CASES = [Case("exaone4_5", "exaone4_5", build, published, drafts, config)]
