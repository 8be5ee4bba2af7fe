"""Models of real shapes with random weights, built on the device from configs: nothing is downloaded, nothing means anything.

What a round costs depends on shapes alone, not on what weights say. Where the shapes come from stands beside each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mtpdecode import MTPDecoder, MTPHead
from mtpdecode.assistant import Assistant
from mtpdecode.families import FAMILIES

SLIDING, FULL = "sliding_attention", "full_attention"


class Shape(NamedTuple):
    """A model to build.

    config     class of its config, in transformers       settings  of the config       tiny  what `scale="tiny"` changes of them
    family     the row of the family table whose head, or assistant, it gets            assistant  the assistant's config, if any
    source     where the shapes were read
    """

    name: str
    config: str
    settings: dict[str, Any]
    tiny: dict[str, Any]
    family: str
    source: str
    assistant: dict[str, Any] | None = None
    tiny_assistant: dict[str, Any] | None = None


class Built(NamedTuple):
    """A target, and what drafts for it: a head or an assistant."""

    shape: Shape
    target: PreTrainedModel
    head: MTPHead | None
    assistant: Assistant | None

    @property
    def drafter(self) -> nn.Module:
        drafter = self.head if self.head is not None else self.assistant
        assert drafter is not None
        return drafter

    def decoder(self, **options: Any) -> MTPDecoder:
        drafter = {"head": self.head} if self.head is not None else {"assistant": self.assistant}
        return MTPDecoder.from_model(self.target, **drafter, **options)


TINY = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"num_hidden_layers": 2}

MIMO = Shape(
    name="mimo-7b",
    config="Qwen2Config",
    settings={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "vocab_size": 151680,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 640000.0},
        "tie_word_embeddings": False,
    },
    tiny=TINY,
    family="mimo",
    source="config.json of XiaomiMiMo/MiMo-7B-Base; transformers reads its base as Qwen2",
)
QWEN = Shape(
    name="qwen3.5-4b",
    config="Qwen3_5TextConfig",
    settings={
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "vocab_size": 248320,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "tie_word_embeddings": True,
    },
    tiny=TINY
    | {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    family="qwen3_5",
    source="published sizes of Qwen/Qwen3.5-4B, 3 linear layers to 1 full; linear layers as transformers has them by default",
)
GEMMA = Shape(
    name="gemma-4-e2b",
    config="Gemma4TextConfig",
    settings={
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "vocab_size": 262144,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 512,
        "layer_types": [SLIDING, SLIDING, SLIDING, SLIDING, FULL] * 7,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    tiny=TINY
    | {
        "num_hidden_layers": 5,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": 16,
        "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
    },
    family="gemma4",
    source="config.json of google/gemma-4-E2B-it and of google/gemma-4-E2B-it-assistant; text alone",
    assistant={
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": 1536,
        "use_ordered_embeddings": True,
        "num_centroids": 2048,
        "centroid_intermediate_top_k": 32,
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size": 256,
            "intermediate_size": 2048,
            "vocab_size": 262144,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 4,
            "head_dim": 256,
            "global_head_dim": 512,
            "sliding_window": 512,
            "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        },
    },
    tiny_assistant={
        "hidden_size": 16,
        "intermediate_size": 24,
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "num_kv_shared_layers": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "layer_types": [SLIDING, FULL],
    },
)
GLM = Shape(
    name="glm-4.5-air-12-layers",
    config="Glm4MoeConfig",
    settings={
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "vocab_size": 151552,
        "num_hidden_layers": 12,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    tiny=TINY | {"head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2},
    family="glm4_moe",
    source="config.json of zai-org/GLM-4.5-Air, whose 46 layers are cut to 12: with the head's, 55 GiB in bfloat16",
)
SHAPES = {shape.name: shape for shape in (MIMO, QWEN, GEMMA, GLM)}


def build(shape: Shape, device: torch.device, dtype: torch.dtype, scale: str = "real") -> Built:
    """Target and head or assistant, on the device from the first byte on. AttributeError: transformers lacks the model."""
    settings = shape.settings | (shape.tiny if scale == "tiny" else {})
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    config = getattr(transformers, shape.config)(**settings, **ends)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # what is built beside the target is in its dtype too, or would not fit
    try:
        with torch.device(device):
            torch.manual_seed(0)
            target = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            return _with_drafter(shape, target, scale)
    finally:
        torch.set_default_dtype(before)


def _with_drafter(shape: Shape, target: PreTrainedModel, scale: str) -> Built:
    row = next(row for row in FAMILIES if row.family == shape.family)
    if shape.assistant is None:
        head = MTPHead(target, row).eval()
        return Built(shape, target, randomised(head), None)
    config = shape.assistant
    if scale == "tiny":
        text = config["text_config"] | (shape.tiny_assistant or {})
        sizes = {"backbone_hidden_size": TINY["hidden_size"], "num_centroids": 8, "centroid_intermediate_top_k": 2}
        config = config | sizes | {"text_config": text}
    return Built(shape, target, None, randomised(Assistant(target, row, config)))


@torch.no_grad()
def randomised(module: Any) -> Any:
    """With matrices as transformers initialises a target's: some of a block's are not initialised at all."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02)
    return module


# ── what a round must move ──────────────────────────────────────────────────────────────────────────────────────────────────


def round_bytes(built: Built, num_speculative_tokens: int, num_rows: int, num_slots: int, bytes_per_slot: int) -> int:
    """What a round must read at least once, in bytes: the target's weights, the head's for each draft token, keys and values.

    Of experts, as many as a window reaches on average if each token chooses on its own. Embeddings are looked up, not read.
    """
    k = num_speculative_tokens
    output = built.target.get_output_embeddings().weight
    window = num_rows * (k + 1)
    weights = read_bytes(built.target, window) + _size(output)
    if k and built.assistant is not None:
        weights += k * (read_bytes(built.assistant, num_rows) + _scored_bytes(built.assistant, output.shape[0]))
    elif k:
        weights += read_bytes(built.drafter, window) + (k - 1) * read_bytes(built.drafter, num_rows) + k * _size(output)
    return int(weights + num_rows * num_slots * bytes_per_slot)


def read_bytes(module: nn.Module, num_tokens: int) -> float:
    """What a window of so many tokens reads of the module's own weights: not of embeddings, nor of output layers."""
    left_out = {id(parameter) for each in module.modules() if isinstance(each, nn.Embedding) for parameter in each.parameters()}
    left_out |= {id(each.weight) for name, each in module.named_modules() if name.endswith("lm_head")}
    sizes = ((name, parameter) for name, parameter in module.named_parameters() if id(parameter) not in left_out)
    return sum(_size(parameter) * _share(name, parameter, module, num_tokens) for name, parameter in sizes)


def _share(name: str, parameter: Tensor, module: nn.Module, num_tokens: int) -> float:
    """Of an expert's weights, the chance that some token chooses it; of all others, 1."""
    if ".experts." not in name:
        return 1.0
    config: Any = module.config
    config = config.get_text_config() if isinstance(module, PreTrainedModel) else config
    return 1.0 - (1.0 - config.num_experts_per_tok / parameter.shape[0]) ** num_tokens


def _scored_bytes(assistant: Assistant, vocab_size: int) -> float:
    """Of an assistant's output layer: all of it, or the tokens of the centroids that it chooses."""
    weight, chooser = assistant.model.embed_tokens.weight, assistant.masked_embedding
    share = 1.0 if chooser is None else chooser.num_chosen / chooser.centroids.out_features
    return _size(weight) * share


def slot_bytes(decoder: MTPDecoder) -> int:
    """Keys and values of one token in all layers of the target, after a call. Sliding layers count like others."""
    cache: Any = decoder.cache
    held = [tensor for tensor, axis in cache.growing() if axis == 2 and tensor.dim() == 4]
    return int(sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in held))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
