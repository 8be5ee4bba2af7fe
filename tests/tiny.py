"""Tiny seeded targets, heads and checkpoints, built from configs: nothing is downloaded, nothing is trained.

Random weights give dull text: constant or in a short circle. So the output layer of a target is tilted towards a circle through
the whole vocabulary, from which attention makes it stray all the time; a head gets the same tilt and the target's own last layer,
so that it is right about every other time at every draft position (`tests/unit/test_tiny.py` holds both to it).
"""

import copy
import json
from functools import cache
from itertools import zip_longest

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationMixin,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mtpdecode import DraftSchedule, MTPDecoder, MTPHead
from mtpdecode.families import FAMILIES
from mtpdecode.target import cache_keyword, decoder_of, final_norm_of

PAD, BOS, EOS, VOCAB, SIZE, WINDOW = 0, 1, 2, 48, 32, 8
CACHE = cache_keyword(GenerationMixin.prepare_inputs_for_generation)
"""What this transformers calls a cache."""

DENSE = {
    "hidden_size": SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
MIXTURE = DENSE | {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
MIMO_ROPE = {"rope_type": "default", "rope_theta": 640000.0}

TARGETS = {
    "llama": (LlamaForCausalLM, LlamaConfig, DENSE),
    "mimo": (Qwen2ForCausalLM, Qwen2Config, DENSE | {"rms_norm_eps": 1e-5, "rope_parameters": MIMO_ROPE}),
    "sliding": (Qwen2ForCausalLM, Qwen2Config, DENSE | SLIDING),
    "mistral": (MistralForCausalLM, MistralConfig, DENSE | {"num_key_value_heads": 1, "sliding_window": 2 * WINDOW}),
    "glm4_moe": (Glm4MoeForCausalLM, Glm4MoeConfig, MIXTURE | {"head_dim": 8}),
    "deepseek_v3": (DeepseekV3ForCausalLM, DeepseekV3Config, MIXTURE | LATENT | {"num_key_value_heads": 4}),
}
"""Name -> class, config class and settings. "sliding" mixes full and sliding layers, "mistral" has sliding ones alone and a
single key-value head for all queries, "mimo" is what transformers makes of a MiMo base."""

NAMES = tuple(TARGETS)
ROWS = {"sliding": "llama", "mistral": "llama"}
"""Targets without a row of their own in the table -> the row whose head they get."""

SEEDS = {"llama": 2, "deepseek_v3": 5}
"""Where seed 0 gives dull or narrowly decided text."""

LENGTHS = (9, 1, 4, 2, 7)


def prompts(num_rows=5, seed=0, lengths=LENGTHS):
    """Ragged rows of token ids, one of them a single token."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [lengths[row % len(lengths)] for row in range(num_rows)]
    return [torch.randint(3, VOCAB, (size,), generator=generator).tolist() for size in sizes]


# ── targets and heads ───────────────────────────────────────────────────────────────────────────────────────────────────────


def build(name, **changes):
    """A new target in eval mode, float32, with some settings changed."""
    model_class, config_class, settings = TARGETS[name]
    model = model_class(config_class(**(settings | changes))).eval()
    return fill(model, SEEDS.get(name, 0))


@cache
def target(name):
    """The one target of a name that all tests share: to be left as it was."""
    return build(name)


def row_of(name):
    """The row of the family table whose head a target gets."""
    return next(row for row in FAMILIES if row.family == ROWS.get(name, name))


def build_head(model, spec, num_layers=1, **kwargs):
    """A new head that is right about every other time. No two of its parts are equal, so that none can stand in for another."""
    head, generator = MTPHead(model, spec, num_layers, **kwargs).eval(), torch.Generator().manual_seed(num_layers)
    eye = torch.eye(SIZE)
    parts = {"embed": eye, "hidden": 0.3 * eye}
    order = ("embed", "hidden") if spec.combine == "embed_hidden" else ("hidden", "embed")
    with torch.no_grad():
        for layer in head.layers:
            if spec.combine == "sum":
                layer.proj_embed.weight.copy_(parts["embed"])
                layer.proj_hidden.weight.copy_(parts["hidden"])
            else:
                layer.proj.weight.copy_(torch.cat([parts[part] for part in order], dim=1))
            for block in getattr(layer.block, "layers", [layer.block]):  # a block may be a row of the target's layers
                block.load_state_dict(_last_of_each(model, block))
            if head.spec.norm_out == "own":
                layer.norm_out.load_state_dict(final_norm_of(model).state_dict())
            if spec.proj_bias and spec.combine != "sum" and layer.proj.bias is not None:
                layer.proj.bias.copy_(0.1 * torch.randn(SIZE, generator=generator))
            if spec.embedding == "own":
                layer.embedding.load_state_dict(model.get_input_embeddings().state_dict())
            if spec.lm_head == "own":
                layer.lm_head.load_state_dict(model.get_output_embeddings().state_dict())
            for own in layer.parameters():
                own += 0.05 * torch.randn(own.shape, generator=generator) * own.abs().mean()
            for norm in (layer.norm_embed, layer.norm_hidden):
                norm.weight += 0.2 * torch.randn(norm.weight.shape, generator=generator)
    return head


def _last_of_each(model, block):
    """The target's own tensors for a block: those of its last layer, or of the last layer that has one of the name and shape."""
    shapes = {name: tensor.shape for name, tensor in block.state_dict().items()}
    layers = [layer.state_dict() for layer in decoder_of(model).layers]
    layers.append({f"final_layernorm.{name}": tensor for name, tensor in final_norm_of(model).state_dict().items()})
    layers += [{_single(name): tensor for name, tensor in layer.items()} for layer in layers]
    return {name: each[name] for each in layers for name in each if each[name].shape == shapes.get(name)}


def _single(name):
    """What a layer with two of everything calls its first ones, in the words of a layer with one."""
    return name.replace(".0.", ".").replace("mlps.", "mlp.")


def head(name, num_layers=1):
    """The one head of a shared target, of so many layers."""
    return _head(name, num_layers)


@cache
def _head(name, num_layers):
    return build_head(target(name), row_of(name), num_layers)


def decoder(name, num_speculative_tokens=2, num_layers=1, **kwargs):
    """A decoder over the shared target and head."""
    return MTPDecoder.from_model(
        target(name), head=head(name, num_layers), num_speculative_tokens=num_speculative_tokens, **kwargs
    )


def fill(model, seed=0, stray=1.2):
    """The model, with random weights of a lively kind: see the head of this file. stray: how far layers lead off the circle."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter, scale):
        return torch.randn(parameter.shape, generator=generator) * scale

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(normal(tensor, 0.1))
            elif name not in dict(model.named_parameters()):
                continue
            elif tensor.dim() == 1:
                tensor.copy_(normal(tensor, 0.2) + ("norm" in name))
            else:
                far = stray if ("o_proj" in name or "down_proj" in name) else 1.0
                tensor.copy_(normal(tensor, far * tensor.shape[-1] ** -0.5))
        embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding.copy_(normal(embedding, 1.0))
        output.copy_(normal(output, 0.3))
        circle = torch.randperm(len(output) - 3, generator=generator) + 3
        follower = torch.arange(len(output))
        follower[circle] = circle.roll(-1)
        output[follower] += 0.5 * embedding
        output -= 0.3 * embedding  # a token does not follow itself
    return model


# ── batches, and what plain decoding makes of them ──────────────────────────────────────────────────────────────────────────


def padded(rows, side="left"):
    """Rows of ids -> input_ids and attention_mask (B, P), with PAD on one side, or on both."""
    width = max(map(len, rows)) + (side == "both")
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        gap = width - len(row)
        start = {"left": gap, "right": 0, "both": gap // 2}[side]
        ids[number, start : start + len(row)] = torch.tensor(row)
        mask[number, start : start + len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def one(row):
    """A row of ids -> (1, n)."""
    return torch.tensor([row])


_PLAIN = {}


def plain(name, row, **options):
    """The new tokens that `model.generate` gives a row alone, greedily unless the options say otherwise."""
    key = (name, tuple(row), repr(sorted(options.items())))
    if key not in _PLAIN:
        _PLAIN[key] = alone(target(name), row, **options)
    return _PLAIN[key]


def alone(model, row, **options):
    """The same for any model, computed anew."""
    ids = one(row)
    sequence = model.generate(ids, attention_mask=torch.ones_like(ids), **({"do_sample": False} | options))
    return sequence[0, len(row) :].tolist()


def assert_rows(sequences, width, expected, what):
    """The new tokens (from column `width` on) of every row are those expected, then padding up to the longest."""
    longest = max(map(len, expected))
    wanted = [row + [PAD] * (longest - len(row)) for row in expected]
    for number, (found, row) in enumerate(zip(sequences[:, width:].tolist(), wanted, strict=True)):
        assert found == row, f"{what}: row {number} is {found}, and plain decoding of that row alone gives {row}"


# ── checkpoints in the families' real layouts ───────────────────────────────────────────────────────────────────────────────

DEEPSEEK_PARTS = {"norm_embed": "enorm", "norm_hidden": "hnorm", "proj": "eh_proj", "norm_out": "shared_head.norm"}
MIMO_PARTS = {
    "norm_embed": "token_layernorm",
    "norm_hidden": "hidden_layernorm",
    "proj": "input_proj",
    "norm_out": "final_layernorm",
}


def head_in_layout(head, model):
    """The head's tensors as the family publishes them: written out by hand, knowing nothing of `mtpdecode.checkpoint`."""
    mimo = head.spec.family == "mimo"
    tensors = {}
    for index, layer in enumerate(head.layers):
        prefix = f"model.mtp_layers.{index}." if mimo else f"model.layers.{model.config.num_hidden_layers + index}."
        parts = MIMO_PARTS if mimo else DEEPSEEK_PARTS
        tensors |= {f"{prefix}{theirs}.weight": getattr(layer, ours).weight for ours, theirs in parts.items()}
        for name, tensor in layer.block.state_dict().items():
            tensors |= {prefix + key: value for key, value in _unstacked(name, tensor)}
        if head.spec.family in ("glm4_moe", "deepseek_v3"):
            tensors[prefix + "embed_tokens.weight"] = model.get_input_embeddings().weight
            tensors[prefix + "shared_head.head.weight"] = model.get_output_embeddings().weight
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _unstacked(name, tensor):
    """One tensor of the block -> what checkpoints hold: a matrix per expert where transformers stacks experts."""
    if name.endswith("experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        for expert, both in enumerate(tensor):
            gate, up = both.chunk(2)
            yield f"{stem}{expert}.gate_proj.weight", gate
            yield f"{stem}{expert}.up_proj.weight", up
    elif name.endswith("experts.down_proj"):
        for expert, down in enumerate(tensor):
            yield f"{name.removesuffix('down_proj')}{expert}.down_proj.weight", down
    else:
        yield name, tensor


def write_checkpoint(folder, model, head=None, num_shards=1, config=None, **tensors):
    """Target and head as one checkpoint, as the family publishes it.

    config   changes to config.json (None takes a field out)        tensors  changes to the files' tensors, likewise
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).save_pretrained(folder)  # a copy: transformers writes into the config of what it saves
    whole = load_file(folder / "model.safetensors") | (head_in_layout(head, model) if head else {}) | tensors
    settings = json.loads((folder / "config.json").read_text())
    if head:
        settings["num_nextn_predict_layers"] = head.num_layers
        settings |= mimo_config(settings) if head.spec.family == "mimo" else {}
    _write_json(folder / "config.json", settings | (config or {}))
    _write_shards(folder, {name: tensor for name, tensor in whole.items() if tensor is not None}, num_shards)
    return folder


def mimo_config(settings):
    """What the published config.json of MiMo says, in the fields of its time."""
    settings.pop("rope_parameters")
    settings.pop("layer_types", None)
    return {
        "architectures": ["MiMoForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig", "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM"},
        "model_type": "mimo",
        "attention_bias": True,
        "head_dim": settings["hidden_size"] // settings["num_attention_heads"],
        "rope_theta": 640000,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "use_mrope": False,
    }


def _write_json(path, content):
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}, indent=2))


def _write_shards(folder, tensors, num_shards):
    """One file, or several with an index; the head's tensors, sorted by name, come to lie in more than one of them."""
    (folder / "model.safetensors").unlink()
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    files = {f"model-{n + 1:05}-of-{num_shards:05}.safetensors": names[n::num_shards] for n in range(num_shards)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": {name: file for file, held in files.items() for name in held}}
    _write_json(folder / "model.safetensors.index.json", index)


def streamed_in_turns(decoder, ids, settings, **options):
    """One decoder, several streams that take turns: what each was given, chunk by chunk."""
    together = [[] for _ in settings]
    for chunks in zip_longest(*(decoder.stream(ids, **options, **each) for each in settings)):
        for text, chunk in zip(together, chunks, strict=True):
            text += [] if chunk is None else [chunk]
    return together


class Turns(DraftSchedule):
    """Some rounds of each K, so that each is recorded, and taken up again behind another."""

    choices = (0, 1, 3)

    def next_length(self, metrics):
        return (1, 3, 0, 3, 1, 0)[metrics.num_rounds // 5 % 6]
