"""Step-3.5-Flash and 3.7-Flash: three chained layers, each with an output layer of its own, behind the base's last one.

The base's last layer attends to everything, with fewer heads than the sliding layers that the head is made of. Step-3.7 is a
vision model around the text model; Step-3.5 is the text model alone, which transformers has no class of its own for.
"""

import copy

import torch
import torch.nn.functional as F
from transformers import Step3p7Config, Step3p7ForConditionalGeneration

from tests import tiny
from tests.families.twins import heads, rms_norm
from tests.families.zoo import Case

NUM_LAYERS = 3
TEXT = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": tiny.SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_attention_groups": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "max_seq_len": 512,
    "rms_norm_eps": 1e-5,
    "num_nextn_predict_layers": NUM_LAYERS,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"] + NUM_LAYERS * ["sliding_attention"],
    "sliding_window": 32,
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "num_attention_heads": 6,
        "num_attention_groups": 2,
        "head_dim": 8,
    },
    "use_head_wise_attn_gate": True,
    "moe_layers_enum": "0,2",
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_intermediate_size": 16,
    "share_expert_dim": 16,
    "moe_router_scaling_factor": 1.5,
    "rope_theta": [5000000.0, 10000.0, 5000000.0] + NUM_LAYERS * [10000.0],
    "partial_rotary_factors": [0.5, 1.0, 0.5] + NUM_LAYERS * [1.0],
    "swiglu_limits": [0.02, 0.02, 0.02] + NUM_LAYERS * [0.0],
    "swiglu_limits_shared": [0.02, 0.02, 0.02] + NUM_LAYERS * [0.0],
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
}
"""As published: the lists go on for the head's layers. Limits that would be felt stand where the head must not look for them."""
VISION = {"width": 16, "layers": 0, "heads": 2, "image_size": 28, "patch_size": 14, "mlp_ratio": 2.0}
SURROUNDINGS = {
    "enorm": "norm_embed",
    "hnorm": "norm_hidden",
    "eh_proj": "proj",
    "transformer.shared_head.norm": "norm_out",
    "transformer.shared_head.output": "lm_head",
}


def build(seed=6):
    settings = {"text_config": copy.deepcopy(TEXT), "vision_config": dict(VISION), "image_token_id": tiny.VOCAB - 1}
    model = tiny.fill(Step3p7ForConditionalGeneration(Step3p7Config(**settings)).eval(), seed)
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if name.endswith("norm.weight"):
                parameter -= 1  # these norms scale by 1 + weight
    return model


def config(settings):
    """Lists that go on for the head, and the fields of the published text config."""
    return settings | {"text_config": TEXT | {"model_type": "step3p5"}}


def text_config(settings):
    """The published config of Step-3.5, whose text model is not wrapped."""
    names = {"architectures": ["Step3p5ForCausalLM"], "auto_map": {"AutoConfig": "configuration_step3p5.Step3p5Config"}}
    return {"dtype": "float32", "model_type": "step3p5"} | names | TEXT


def published(head, model):
    """`model.layers.{N + i}.*`, an output layer in each."""
    tensors = {}
    for index, layer in enumerate(head.layers):
        prefix = f"model.layers.{TEXT['num_hidden_layers'] + index}."
        tensors |= {f"{prefix}{theirs}.weight": getattr(layer, ours).weight for theirs, ours in SURROUNDINGS.items()}
        tensors |= {prefix + name: tensor for name, tensor in layer.block.state_dict().items()}
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


# ── the twin ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Twin:
    """Step's head in plain torch: depth k reads the output of depth k - 1 and the tokens k + 1 places ahead, over all rows anew.

    A draft deeper than the head goes round: step k takes layer k % 3.     layer   step -> the number of its layer
    own_head  whether a layer's own output layer speaks, or the target's
    """

    def __init__(self, target, tensors, layer=lambda step: step % NUM_LAYERS, own_head=True):
        self.target, self.tensors, self.layer, self.own_head = target, tensors, layer, own_head
        self.fed = lambda ids: pre_norm_states(target, ids)

    @torch.no_grad()
    def drafts(self, text, num_steps):
        hidden, tokens, logits = self.fed(text[:-1]), list(text[1:]), []
        for step in range(num_steps):
            number = TEXT["num_hidden_layers"] + self.layer(step)
            prefix, self.slides = f"model.layers.{number}.", TEXT["layer_types"][number] == "sliding_attention"
            self.part = {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
            embeds = self.target.get_input_embeddings()(torch.tensor(tokens))
            pairs = torch.cat([self.norm(embeds, "enorm"), self.norm(hidden, "hnorm")], dim=-1)
            hidden = self.block(self.linear(pairs, "eh_proj"))
            last = self.norm(hidden[-1:], "transformer.shared_head.norm")[0]
            logits.append(self.linear(last, "transformer.shared_head.output") if self.own_head else self.target.lm_head(last))
            tokens = [*tokens[1:], int(logits[-1].argmax())]
        return torch.stack(logits)

    def linear(self, x, name):
        return F.linear(x, self.part[f"{name}.weight"])

    def norm(self, x, name):
        return rms_norm(x, 1 + self.part[f"{name}.weight"], TEXT["rms_norm_eps"])

    def block(self, x):
        x = x + self.attention(self.norm(x, "input_layernorm"))
        y = self.norm(x, "post_attention_layernorm")
        return x + self.linear(F.silu(self.linear(y, "mlp.gate_proj")) * self.linear(y, "mlp.up_proj"), "mlp.down_proj")

    def attention(self, x):
        """With normed queries and keys, and a gate per head. x (n, D)."""
        query, key, value = (heads(x, self.part[f"self_attn.{name}_proj.weight"], TEXT["head_dim"]) for name in "qkv")
        query, key = (self.rotated(self.norm(y, f"self_attn.{name}_norm")) for y, name in ((query, "q"), (key, "k")))
        key, value = (y.repeat_interleave(len(query) // len(y), 0) for y in (key, value))
        distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
        hidden = (distance < 0) | (distance >= (TEXT["sliding_window"] if self.slides else len(x)))
        scores = (query @ key.transpose(-1, -2) * TEXT["head_dim"] ** -0.5).masked_fill(hidden, float("-inf"))
        gate = self.linear(x, "self_attn.g_proj").sigmoid()
        mixed = (scores.softmax(-1) @ value).transpose(0, 1) * gate[..., None]
        return self.linear(mixed.flatten(1), "self_attn.o_proj")

    def rotated(self, x):
        """x (H, n, d) turned by position, halves together; where a layer does not slide, half of the features, and slower."""
        base, size = (1e4, x.shape[-1]) if self.slides else (5e6, x.shape[-1] // 2)
        angle = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(size // 2) / (size // 2))
        first, second, rest = x.split([size // 2, size // 2, x.shape[-1] - size], dim=-1)
        turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
        return torch.cat([*turned, rest], dim=-1)


def pre_norm_states(target, ids):
    """The target's hidden states (n, D) as they enter its final norm."""
    kept = []
    hook = target.get_decoder().norm.register_forward_hook(lambda _, inputs, output: kept.append(inputs[0][0]))
    target(torch.tensor([ids]), use_cache=False)
    hook.remove()
    return kept[0]


def drafts(model, tensors, text, num_steps):
    return Twin(model, tensors).drafts(text, num_steps)


CASES = [Case("step3p7", "step3p7", build, published, drafts, config, num_layers=NUM_LAYERS)]
