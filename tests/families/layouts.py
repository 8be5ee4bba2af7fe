"""Published layouts, written out by hand, and transformers' own MtpModel fed from them: what many cases are made of."""

import copy
import re
from functools import partial
from inspect import signature
from typing import NamedTuple

import torch
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from tests import tiny

DEEPSEEK_NAMES = {"norm_embed": "enorm", "norm_hidden": "hnorm", "proj": "eh_proj", "norm_out": "shared_head.norm"}
QWEN_NAMES = {"norm_embed": "pre_fc_norm_embedding", "norm_hidden": "pre_fc_norm_hidden", "proj": "fc", "norm_out": "norm"}
MTP_MODEL_NAMES = {"norm_embed": "enorm", "norm_hidden": "hnorm", "proj": "eh_proj", "norm_out": "post_norm"}


class Layout(NamedTuple):
    """Where a family writes what. {i} is the number of the MTP layer, {n} that plus the target's number of layers.

    block     what stands before the names of the decoder layer
    around    our part of a head -> its full name
    renames   (in transformers' module, in the checkpoint), fragments of the block's names
    copies    full names of the repeated embedding and output layer, if the family repeats them
    """

    block: str
    around: dict[str, str]
    renames: tuple[tuple[str, str], ...] = ()
    copies: tuple[str, ...] = ()

    def published(self, head, model):
        """The head's tensors under their real names."""
        tensors = {}
        for index, layer in enumerate(head.layers):
            at = place(index, model)
            for ours, theirs in self.around.items():
                for name, tensor in getattr(layer, ours).state_dict().items():
                    tensors[f"{theirs.format(**at)}.{name}"] = tensor
            for name, tensor in layer.block.state_dict().items():
                for part, value in unstacked(name, tensor):
                    tensors[self.block.format(**at) + replaced(part, self.renames)] = value
            same = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
            tensors |= {name.format(**at): tensor for name, tensor in zip(self.copies, same, strict=False)}
        return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}

    def layer(self, tensors, index, model):
        """The published tensors of one MTP layer -> {our part: its tensors}, experts stacked as transformers has them."""
        at = place(index, model)
        named = {ours: theirs.format(**at) + "." for ours, theirs in self.around.items()}
        parts = {ours: below(tensors, prefix) for ours, prefix in named.items()}
        skipped = (*named.values(), *(name.format(**at) for name in self.copies))
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(skipped)}
        back = [(theirs, ours) for ours, theirs in self.renames]
        block = {replaced(name, back): tensor for name, tensor in below(rest, self.block.format(**at)).items()}
        return parts | {"block": stacked(block)}


def deepseek_layout(prefix="model.layers.{n}.", **changes):
    """DeepSeek's names behind the last layer of the base, with or without changes."""
    around = {ours: prefix + theirs for ours, theirs in DEEPSEEK_NAMES.items()}
    copies = (prefix + "embed_tokens.weight", prefix + "shared_head.head.weight")
    return Layout(prefix, around, copies=copies)._replace(**changes)


def qwen_layout(**changes):
    """Qwen's names: what surrounds the block lies one level up, once."""
    return Layout("mtp.layers.{i}.", {ours: "mtp." + theirs for ours, theirs in QWEN_NAMES.items()})._replace(**changes)


def place(index, model):
    return {"i": index, "n": model.config.get_text_config().num_hidden_layers + index}


def below(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def replaced(name, pairs):
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def unstacked(name, tensor):
    """One tensor of the block -> what checkpoints hold: a matrix per expert where transformers stacks experts."""
    parent, _, last = name.rpartition("experts.")
    if not parent or last not in ("gate_up_proj", "down_proj"):
        return [(name, tensor)]
    halves = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
    return [
        (f"{parent}experts.{expert}.{half}.weight", part)
        for expert, both in enumerate(tensor)
        for half, part in zip(halves, both.chunk(len(halves)), strict=True)
    ]


def stacked(block):
    """The opposite of `unstacked`, over a whole block."""
    single = re.compile(r"(.*\bexperts\.)(\d+)\.(gate|up|down)_proj\.weight")
    matrices = {match.groups(): tensor for name, tensor in block.items() if (match := single.fullmatch(name))}
    whole = {name: tensor for name, tensor in block.items() if not single.fullmatch(name)}
    for parent in {parent for parent, _, _ in matrices}:
        experts = range(1 + max(int(expert) for stem, expert, _ in matrices if stem == parent))
        part = {half: [matrices[parent, str(e), half] for e in experts] for half in ("gate", "up", "down")}
        pairs = zip(part["gate"], part["up"], strict=True)
        whole[parent + "gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        whole[parent + "down_proj"] = torch.stack(part["down"])
    return whole


# ── transformers' MtpModel as the twin ──────────────────────────────────────────────────────────────────────────────────────


class Twin:
    """transformers' MtpModel around a copy of a target. It knows no recurrent reuse: deeper steps take its last layer one by one.

    layers        per MTP layer, {our part: its tensors}        hidden   which of the target's hidden states is fed
    hidden_first  the order inside the projection               recycle  "raw": the block's own output feeds the next step
    zero_first    whether row 0 sees zeros instead of its embedding
    types         the attention type of every MTP layer; None: the base's last one        mlp_types   the same of MLPs
    """

    def __init__(self, model, layers, hidden="post_norm", hidden_first=False, types=None, mlp_types=None, **how):
        self.main, self.depth, self.hidden = copy.deepcopy(model), len(layers), hidden
        config = self.main.config.get_text_config()
        config.num_mtp_layers = self.depth
        config.mtp_hidden_states_first = hidden_first
        if config.model_type == "mistral":  # its layers all slide, and it has no list that says so
            config.layer_types = ["sliding_attention"] * config.num_hidden_layers
        if getattr(config, "layer_types", None):
            config.mtp_layer_types = [types or config.layer_types[-1]] * self.depth
        if getattr(config, "mlp_layer_types", None):
            config.mtp_mlp_layer_types = [mlp_types or config.mlp_layer_types[-1]] * self.depth
        self.mtp, self.raw = MtpModel(self.main, self.depth).eval(), []
        self.recycle, self.zero_first = how.pop("recycle", "normed"), how.pop("zero_first", False)
        assert not how, f"{how} means nothing here"
        for theirs, parts in zip(self.mtp.layers, layers, strict=True):
            theirs.mtp_block.load_state_dict(parts["block"])
            for ours, name in MTP_MODEL_NAMES.items():
                getattr(theirs, name).load_state_dict(parts[ours])
            theirs.mtp_block.register_forward_hook(lambda _, inputs, output: self.raw.append(output))

    def states(self, ids):
        """The target's hidden states (1, n, D), before or after the final norm."""
        kept = []
        hook = self.main.get_decoder().norm.register_forward_hook(lambda _, inputs, output: kept.extend((inputs[0], output)))
        self.main(ids, use_cache=False)
        hook.remove()
        return kept[self.hidden == "post_norm"]

    def passed(self, index, embeds, hidden, positions, cache):
        """One layer over some rows. transformers 5.23 has a method for it, 5.17 has not, nor rotary angles by layer type."""
        mtp, types = self.mtp, getattr(self.mtp.config, "layer_types", None)
        by_type = "layer_type" in signature(mtp.rotary_emb.forward).parameters
        angles = mtp.rotary_emb(embeds, positions, types[index]) if by_type else mtp.rotary_emb(embeds, positions)
        masks = mtp.create_masks_for_mtp_layer(index, embeds, cache, positions)
        return mtp.layers[index](embeds, hidden, angles, position_ids=positions, **{tiny.CACHE: cache}, **masks)

    @torch.no_grad()
    def drafts(self, text, num_steps):
        """The logits (num_steps, V) of drafts behind a text, computed from nothing."""
        ids, cache = torch.tensor([text]), MtpCache(config=self.main.config.get_mtp_config())
        hidden, tokens, positions = self.states(ids[:, :-1]), ids[:, 1:], torch.arange(1, len(text))[None]
        logits = []
        for step in range(num_steps):
            if step >= self.depth:  # one row past the end: the last draft token, and what the last step put out
                hidden, tokens, positions = hidden[:, -1:], tokens[:, -1:], positions[:, -1:]
            layer, embeds = min(step, self.depth - 1), self.mtp.embed_tokens(tokens)
            if self.zero_first and step < self.depth:
                embeds[:, 0] = 0
            normed = self.passed(layer, embeds, hidden, positions, cache)
            hidden = normed if self.recycle == "normed" else self.raw[-1]
            logits.append(self.mtp._project_to_logits(normed[:, -1:])[0, 0])
            tokens = torch.cat([tokens[:, 1:], logits[-1].argmax()[None, None]], dim=1)
            positions = positions + 1
        return torch.stack(logits)


def _drafts(layout, num_layers, options, model, tensors, text, num_steps):
    layers = [layout.layer(tensors, index, model) for index in range(num_layers)]
    return Twin(model, layers, **options).drafts(text, num_steps)


def twin_of(layout, num_layers=1, **options):
    """The `drafts` of a case whose head transformers' MtpModel computes, too."""
    return partial(_drafts, layout, num_layers, options)
