"""Nemotron-H: Mamba-2, attention without positions, experts without gates; the head is a pattern of such sub-layers."""

import torch
import torch.nn.functional as F
import transformers
from transformers import NemotronHConfig, NemotronHForCausalLM

from tests import tiny
from tests.families.twins import calmed, causal_attention, chosen_experts, heads, mixture, recurrent_drafts, rms_norm
from tests.families.zoo import Case

SETTINGS = {
    "hidden_size": tiny.SIZE,
    "vocab_size": tiny.VOCAB,
    "layers_block_type": ["linear_attention", "full_attention", "linear_attention", "moe"],
    "mtp_layers_block_type": ["full_attention", "moe"],
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "max_position_embeddings": 256,
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
}
LETTERS = {"linear_attention": "M", "full_attention": "*", "moe": "E", "mlp": "-"}


def build(seed=0, calm=0.6, **changes):
    return calmed(tiny.fill(NemotronHForCausalLM(NemotronHConfig(**(SETTINGS | changes))).eval(), seed), calm)


def config(settings):
    """The published config.json says patterns of letters instead of lists."""
    patterns = {
        "hybrid_override_pattern": settings.pop("layers_block_type"),
        "mtp_hybrid_override_pattern": settings.pop("mtp_layers_block_type"),
    }
    written = {name: "".join(LETTERS[kind] for kind in kinds) for name, kinds in patterns.items()}
    return settings | written | {"num_hidden_layers": len(written["hybrid_override_pattern"])}


def listed(settings):
    """Or it has lists under older names, and counts how often the one layer was repeated in training."""
    older = {"linear_attention": "mamba", "full_attention": "attention", "moe": "moe", "mlp": "mlp"}
    lists = {name: [older[kind] for kind in settings[name]] for name in ("layers_block_type", "mtp_layers_block_type")}
    return settings | lists | {"num_nextn_predict_layers": 2}


def published(head, model):
    """The index runs over the letters of the pattern; the first sub-layer holds the fusion, the last one the final norm."""
    (layer,) = head.layers
    tensors = {
        "mtp.layers.0.enorm.weight": layer.norm_embed.weight,
        "mtp.layers.0.hnorm.weight": layer.norm_hidden.weight,
        "mtp.layers.0.eh_proj.weight": layer.proj.weight,
    }
    for index, sublayer in enumerate(layer.block.layers):
        for name, tensor in sublayer.state_dict().items():
            parent, _, last = name.rpartition("experts.")
            if parent and last in ("up_proj", "down_proj"):
                tensors |= {f"mtp.layers.{index}.{parent}experts.{e}.{last}.weight": one for e, one in enumerate(tensor)}
            else:
                tensors[f"mtp.layers.{index}.{name}"] = tensor
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def drafts(model, tensors, text, num_steps):
    config, kinds = model.config, model.config.mtp_layers_block_type
    part = {name.removeprefix("mtp.layers.").removesuffix(".weight"): tensor for name, tensor in tensors.items()}

    def norm(x, name):
        return rms_norm(x, part[name], config.layer_norm_epsilon)

    def attention(x, at):
        query, key, value = (heads(x, part[f"{at}.{letter}_proj"], config.head_dim) for letter in "qkv")
        return F.linear(causal_attention(query, key, value, config.head_dim**-0.5), part[f"{at}.o_proj"])

    def mlp(x, at):
        return F.linear(F.linear(x, part[f"{at}.up_proj"]).relu().square(), part[f"{at}.down_proj"])

    def experts(x, at):
        routing = chosen_experts(x, part[f"{at}.gate"], part[f"{at}.gate.e_score_correction_bias"], config.num_experts_per_tok)
        latent = F.linear(x, part[f"{at}.fc1_latent_proj"]) if f"{at}.fc1_latent_proj" in part else x
        routed = mixture(latent, *routing, lambda number, token: mlp(token, f"{at}.experts.{number}"))
        routed = F.linear(routed, part[f"{at}.fc2_latent_proj"]) if f"{at}.fc2_latent_proj" in part else routed
        return routed + mlp(x, f"{at}.shared_experts")

    mixers = {"full_attention": attention, "moe": experts, "mlp": mlp}

    def head(embeds, hidden):
        x = F.linear(torch.cat([norm(embeds, "0.enorm"), norm(hidden, "0.hnorm")], -1), part["0.eh_proj"])
        for index, kind in enumerate(kinds):
            x = x + mixers[kind](norm(x, f"{index}.norm"), f"{index}.mixer")
        return norm(x, f"{len(kinds) - 1}.final_layernorm")

    return recurrent_drafts(model, lambda ids: model.model(ids).last_hidden_state[0], head, text, num_steps)


# ── inside a model that sees and hears ──────────────────────────────────────────────────────────────────────────────────────

VISION = {"model_type": "radio", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32} | {
    "max_img_size": 64,
    "video_temporal_patch_size": 2,
}


def build_omni():
    config = transformers.NemotronH_Omni_Reasoning_V3_Config(
        text_config=SETTINGS | {"model_type": "nemotron_h"},
        vision_config=VISION,
        vision_hidden_size=16,
        projector_hidden_size=16,
        video_temporal_patch_size=2,
        image_token_id=tiny.VOCAB - 1,
        video_token_id=tiny.VOCAB - 2,
    )
    model = transformers.NemotronH_Omni_Reasoning_V3(config).eval()
    calmed(tiny.fill(model.language_model), 0.6)
    return model


def omni_config(settings):
    """The published config.json calls the text model's config otherwise."""
    return settings | {"llm_config": config(settings.pop("text_config"))}


def omni_published(head, model):
    return {f"language_model.{name}": tensor for name, tensor in published(head, model).items()}


def omni_drafts(model, tensors, text, num_steps):
    inner = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}
    return drafts(model.language_model, inner, text, num_steps)


def omni():
    skip = "" if "NemotronH_Omni_Reasoning_V3" in dir(transformers) else "this transformers has no nemotron_h_omni"
    return Case("nemotron_h", "nemotron_h-omni", build_omni, omni_published, omni_drafts, omni_config, crop=False, skip=skip)


def case(name, written=config, **changes):
    return Case("nemotron_h", f"nemotron_h-{name}", lambda: build(**changes), published, drafts, written, crop=False)


CASES = [
    case("moe"),
    omni(),
    case(
        "latent",
        listed,
        seed=1,
        moe_latent_size=8,
        layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention", "moe"],
        mtp_layers_block_type=["full_attention", "moe", "full_attention", "mlp"],
    ),
]
