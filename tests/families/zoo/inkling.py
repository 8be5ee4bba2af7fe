"""Inkling: attention with learned distances and short convolutions, and a chain of such layers with dense MLPs as head.

The head reads the embedding as the base norms it. The base's vocabulary is padded, and its final state is divided before the
output layer. Log-scaling of long texts sets in early here, so that rows of different length are told apart.
"""

import copy

import torch
import torch.nn.functional as F
from transformers import InklingConfig, InklingForCausalLM, InklingForConditionalGeneration, InklingTextConfig

from tests import tiny
from tests.families.twins import heads, rms_norm
from tests.families.zoo import Case

TEXT = {
    "vocab_size": tiny.VOCAB + 3,
    "unpadded_vocab_size": tiny.VOCAB,
    "hidden_size": tiny.SIZE,
    "num_hidden_layers": 3,
    "local_layer_ids": [0, 2],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 16,
    "sliding_window_size": 32,
    "d_rel": 4,
    "rel_extent": 24,
    "log_scaling_n_floor": 16,
    "log_scaling_alpha": 0.5,
    "model_max_length": 512,
    "sconv_kernel_size": 4,
    "dense_mlp_idx": 1,
    "dense_intermediate_size": 64,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "route_scale": 2.0,
    "logits_mup_width_multiplier": 2.0,
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
}
"""As published; and once more the experts' width, which transformers 5.17 takes to be that of the published model otherwise."""
TOWERS = {
    "vision_config": {"patch_size": 4, "temporal_patch_size": 2, "hidden_size": 16, "n_layers": 1, "num_attention_heads": 2},
    "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 3},
    "image_token_id": 45,
    "audio_token_id": 44,
    "image_bos_token_id": 43,
    "audio_bos_token_id": 42,
}
CHAINED = {"num_nextn_predict_layers": 3, "chain_hidden_post_norm": True, "local_layer_ids": [1]}
PLAIN = {"num_nextn_predict_layers": 2, "chain_hidden_post_norm": False, "local_layer_ids": [0, 1]}

CALM = 0.4
"""Convolutions as random as all else would drown the text."""
BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    "attn_sconv.conv1d.weight": "attn_sconv.weight",
    "mlp_sconv.conv1d.weight": "mlp_sconv.weight",
    "self_attn.q_proj.weight": "attn.wq_du.weight",
    "self_attn.k_proj.weight": "attn.wk_dv.weight",
    "self_attn.v_proj.weight": "attn.wv_dv.weight",
    "self_attn.r_proj.weight": "attn.wr_du.weight",
    "self_attn.o_proj.weight": "attn.wo_ud.weight",
    "self_attn.q_norm.weight": "attn.q_norm.weight",
    "self_attn.k_norm.weight": "attn.k_norm.weight",
    "self_attn.k_sconv.conv1d.weight": "attn.k_sconv.weight",
    "self_attn.v_sconv.conv1d.weight": "attn.v_sconv.weight",
    "self_attn.rel_logits_proj.proj": "attn.rel_logits_proj.proj",
    "mlp.down_proj.weight": "mlp.w2_md.weight",
    "mlp.global_scale": "mlp.global_scale",
}


def text_settings(mtp):
    """The text config with what transformers makes of the published block about the head."""
    fields = {"num_mtp_layers": "num_nextn_predict_layers", "chain_hidden_post_norm": "chain_hidden_post_norm"}
    said = {ours: mtp[theirs] for ours, theirs in (fields | {"mtp_local_layer_ids": "local_layer_ids"}).items()}
    return copy.deepcopy(TEXT) | said


def build(mtp=CHAINED, wrapped=True, seed=1):
    if wrapped:
        config = InklingConfig(text_config=copy.deepcopy(TEXT), mtp_config=dict(mtp), **copy.deepcopy(TOWERS))
        model = InklingForConditionalGeneration(config)
    else:
        model = InklingForCausalLM(InklingTextConfig(**text_settings(mtp)))
    tiny.fill(model.eval(), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sconv" in name:
                parameter *= CALM
            if name.endswith("global_scale"):
                parameter += 0.5
    return model


def config(settings):
    """transformers writes out what the published config leaves to be understood; the block about the head is there already."""
    return settings | {"text_config": TEXT | {"model_type": "inkling_text"}}


def published(head, model):
    """`model.mtp.layers.{k}.*`, where the rows of gate and up take turns, and one norm for the whole chain."""
    tensors = {}
    for index, layer in enumerate(head.layers):
        prefix = f"model.mtp.layers.{index}."
        parts = {"hidden_norm": layer.norm_hidden, "embed_norm": layer.norm_embed, "input_proj": layer.proj}
        tensors |= {f"{prefix}{name}.weight": part.weight for name, part in parts.items()}
        block = layer.block.state_dict()
        gate, up = block.pop("mlp.gate_proj.weight"), block.pop("mlp.up_proj.weight")
        tensors[prefix + "transformer_block.mlp.w13_dn.weight"] = torch.stack([gate, up], dim=1).flatten(0, 1)
        tensors |= {f"{prefix}transformer_block.{BLOCK[name]}": tensor for name, tensor in block.items()}
    if model.config.get_text_config().chain_hidden_post_norm:
        tensors["model.mtp.chain_norm.weight"] = head.layers[0].norm_out.weight
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


# ── the twin ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Twin:
    """Inkling's head in plain torch: depth k reads what depth k - 1 put out and the tokens k + 1 places ahead, all rows anew.

    beyond   past the last depth: "cycle" goes on with the first one, "last" adds rows to the last one
    scaled   whether full attention grows with the position, as in the base        embed   ids (n,) -> (n, D), normed by the base
    """

    def __init__(self, target, tensors, mtp, beyond="cycle", scaled=False, embed=None):
        self.target, self.tensors, self.mtp, self.beyond, self.scaled = target, tensors, mtp, beyond, scaled
        self.embed = embed or (lambda ids: backbone_normed(target, ids))

    @torch.no_grad()
    def drafts(self, text, num_steps):
        rows = None
        hidden, tokens, logits, depth = (
            post_norm_states(self.target, text[:-1]),
            list(text[1:]),
            [],
            self.mtp["num_nextn_predict_layers"],
        )
        for step in range(num_steps):
            recurrent = step >= depth and self.beyond == "last"
            layer = depth - 1 if recurrent else step % depth
            prefix = f"model.mtp.layers.{layer}."
            self.part = {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
            rows = torch.cat([rows, self.fused(hidden[-1:], tokens[-1:])]) if recurrent else self.fused(hidden, tokens)
            hidden = self.block(rows, sliding=layer in self.mtp["local_layer_ids"])
            if self.mtp["chain_hidden_post_norm"]:
                hidden = rms_norm(hidden, self.tensors["model.mtp.chain_norm.weight"], 1e-6)
            scores = self.target.lm_head(hidden[-1] / TEXT["logits_mup_width_multiplier"])
            logits.append(scores[: TEXT["unpadded_vocab_size"]])
            tokens = [*tokens[1:], int(logits[-1].argmax())]
        return torch.stack(logits)

    def fused(self, hidden, tokens):
        """Hidden states first, then the embedding: (n, D)."""
        embeds = self.embed(torch.tensor(tokens))
        return self.linear(torch.cat([self.norm(hidden, "hidden_norm"), self.norm(embeds, "embed_norm")], -1), "input_proj")

    def linear(self, x, name):
        return F.linear(x, self.part[f"{name}.weight"])

    def norm(self, x, name):
        return rms_norm(x, self.part[f"{name}.weight"], 1e-6)

    def short_convolution(self, x, name):
        """x (n, D) -> x plus a weighted sum of the rows j - 3 to j, feature by feature."""
        weight = self.part[f"transformer_block.{name}.weight"][:, 0]
        before = torch.cat([x.new_zeros(weight.shape[1] - 1, x.shape[1]), x])
        return x + sum(before[k : k + len(x)] * weight[:, k] for k in range(weight.shape[1]))

    def block(self, x, sliding):
        x = x + self.short_convolution(self.attention(self.norm(x, "transformer_block.attn_norm"), sliding), "attn_sconv")
        y = self.norm(x, "transformer_block.mlp_norm")
        gate, up = self.linear(y, "transformer_block.mlp.w13_dn").unflatten(-1, (-1, 2)).unbind(-1)
        y = self.linear(F.silu(gate) * up, "transformer_block.mlp.w2_md") * self.part["transformer_block.mlp.global_scale"]
        return x + self.short_convolution(y, "mlp_sconv")

    def attention(self, x, sliding):
        """Scores are a product of normed queries and keys, and a learned value for their distance. x (n, D)."""
        name, size = "transformer_block.attn.", TEXT["swa_head_dim" if sliding else "head_dim"]
        query = self.norm(heads(x, self.part[f"{name}wq_du.weight"], size), f"{name}q_norm")
        key, value = (self.short_convolution(self.linear(x, f"{name}w{k}_dv"), f"attn.{k}_sconv") for k in "kv")
        key, value = (y.unflatten(-1, (-1, size)).transpose(0, 1) for y in (key, value))
        key, value = (y.repeat_interleave(len(query) // len(y), 0) for y in (self.norm(key, f"{name}k_norm"), value))
        distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
        scores = query @ key.transpose(-1, -2) / size + self.learned(x, distance)
        if self.scaled and not sliding:
            count = torch.arange(1, len(x) + 1) / TEXT["log_scaling_n_floor"]
            scores = scores * (1 + TEXT["log_scaling_alpha"] * count.clamp(min=1).log())[:, None]
        hidden = (distance < 0) | (distance >= (TEXT["sliding_window_size"] if sliding else len(x)))
        law = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self.linear((law @ value).transpose(0, 1).flatten(1), f"{name}wo_ud")

    def learned(self, x, distance):
        """(H, n, n): what a query adds for a key at some distance; nothing where nothing was learned."""
        profiles = self.part["transformer_block.attn.rel_logits_proj.proj"]
        values = heads(x, self.part["transformer_block.attn.wr_du.weight"], TEXT["d_rel"]) @ profiles
        extent = profiles.shape[1]
        found = values.gather(-1, distance.clamp(0, extent - 1).expand(len(values), -1, -1))
        return found.masked_fill((distance < 0) | (distance >= extent), 0.0)


def backbone_normed(target, ids):
    """The embedding as the base's first layer reads it (ids (n,) -> (n, D)): tapped there, whoever norms it.

    In the text model alone: transformers 5.17 norms it a second time where that is wrapped.
    """
    return _tapped(target.get_decoder(), target.get_decoder().layers[0], ids[None], slot=0)


def post_norm_states(target, ids):
    """The target's hidden states (n, D) behind its final norm."""
    return _tapped(target, target.get_decoder().norm, torch.tensor([ids]), slot=1)


def _tapped(model, module, ids, slot):
    kept = []
    hook = module.register_forward_hook(lambda _, inputs, output: kept.append((inputs[0][0], output[0])))
    model(ids, use_cache=False)
    hook.remove()
    return kept[0][slot]


def case(name, mtp, **how):
    def drafts(model, tensors, text, num_steps):
        return Twin(model, tensors, mtp).drafts(text, num_steps)

    settings = config if how.get("wrapped", True) else dict
    num_layers = mtp["num_nextn_predict_layers"]
    return Case("inkling", name, lambda: build(mtp, **how), published, drafts, settings, num_layers=num_layers, crop=False)


CASES = [case("inkling", CHAINED), case("inkling-text", PLAIN, wrapped=False, seed=3)]
