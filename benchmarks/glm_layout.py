"""A Llama and its MTP head, written once more in the layout of GLM-4.5, which vLLM has an MTP for; it has none for a Llama.

The same function: a GLM block without biases and norms of queries, rotated whole, is a Llama block. vLLM wants one mixture of
experts in the target, though, and one in the head. So the last block's MLP becomes the shared expert of a mixture, and so does
the head's; the routed experts beside it are narrow, and their weights are zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NARROW, NUM_EXPERTS = 64, 2
"""The width of a routed expert, in which a shared one is counted, and how many there are."""


def write(checkpoint: Path, folder: Path) -> None:
    """checkpoint: a Llama and its head in one, as `MTPDecoder.save_pretrained` writes them. Raises ValueError for any other."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = {name: tensor for file in sorted(checkpoint.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    if config["model_type"] != "llama" or config["intermediate_size"] % NARROW or config.get("num_nextn_predict_layers") != 1:
        raise ValueError(f"{checkpoint} holds no Llama with one MTP layer whose MLP is a multiple of {NARROW} wide")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(glm_config(config), indent=2))
    if (checkpoint / "generation_config.json").exists():
        (folder / "generation_config.json").write_text((checkpoint / "generation_config.json").read_text())
    save_file(glm_tensors(tensors, config["num_hidden_layers"]), folder / "model.safetensors", metadata={"format": "pt"})


def glm_config(config: dict[str, Any]) -> dict[str, Any]:
    """What a Llama's config says, for `Glm4MoeForCausalLM`."""
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    kept += ("hidden_act", "rms_norm_eps", "vocab_size", "max_position_embeddings", "dtype", "bos_token_id", "eos_token_id")
    return {name: config[name] for name in kept if config.get(name) is not None} | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": False,
        "use_qk_norm": False,
        "tie_word_embeddings": False,
        "rope_parameters": config["rope_parameters"] | {"partial_rotary_factor": 1.0},
        "first_k_dense_replace": config["num_hidden_layers"] - 1,
        "moe_intermediate_size": NARROW,
        "n_shared_experts": config["intermediate_size"] // NARROW,
        "n_routed_experts": NUM_EXPERTS,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 1,
    }


def glm_tensors(tensors: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The tensors by GLM's names; the head is layer `num_layers`, as it was."""
    tensors = {name: tensor for name, tensor in tensors.items() if name != "draft_vocabulary"}
    embedding = tensors["model.embed_tokens.weight"]
    output = tensors.setdefault("lm_head.weight", embedding.clone())
    head = f"model.layers.{num_layers}."
    tensors |= {f"{head}embed_tokens.weight": embedding.clone(), f"{head}shared_head.head.weight": output.clone()}
    for layer in (f"model.layers.{num_layers - 1}.mlp.", f"{head}mlp."):
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"{layer}shared_experts.{name}.weight"] = tensors.pop(f"{layer}{name}.weight")
        tensors |= {f"{layer}{name}": tensor for name, tensor in _idle_experts(embedding).items()}
    return tensors


def _idle_experts(like: Tensor) -> dict[str, Tensor]:
    """A router and experts that add nothing. like: (.., D), of the dtype that they have."""
    size = like.shape[-1]
    shapes = {"gate_proj": (NARROW, size), "up_proj": (NARROW, size), "down_proj": (size, NARROW)}
    experts = {
        f"experts.{number}.{name}.weight": like.new_zeros(shape)
        for number in range(NUM_EXPERTS)
        for name, shape in shapes.items()
    }
    router = {"gate.weight": like.new_zeros(NUM_EXPERTS, size), "gate.e_score_correction_bias": torch.zeros(NUM_EXPERTS)}
    return experts | router
