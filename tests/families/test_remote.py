"""Bases that transformers lacks: their row is in the table, and with the code that comes with the checkpoint they work.

The checkpoints here bring a Llama, or a Ministral, under the family's name. Their heads lie in the family's real layout; drafts
are held to a twin in plain torch. Without `trust_remote_code=True` nothing of theirs is run, and the error says so.
"""

import json
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MinistralConfig, MinistralForCausalLM

from mtpdecode import MTPDecoder, UnsupportedModelError
from mtpdecode.families import FAMILIES
from tests import tiny
from tests.families.twins import causal_attention, heads, rms_norm, rotated_halves

ROWS = {row.family: row for row in FAMILIES}
CODE = """
from transformers import {base}Config, {base}ForCausalLM


class TinyConfig({base}Config):
    model_type = "{model_type}"


class TinyForCausalLM({base}ForCausalLM):
    config_class = TinyConfig
{more}
"""
AUTO_MAP = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
DEEPSEEK = {"norm_embed": "enorm", "norm_hidden": "hnorm", "proj": "eh_proj", "norm_out": "shared_head.norm"}


class Family(NamedTuple):
    """What is published of a family, and how its head drafts."""

    prefix: str
    names: dict[str, str] = DEEPSEEK
    mlp_norm: str = "post_attention_layernorm"
    num_layers: int = 1
    hidden: str = "post_norm"
    recycle: str = "normed"
    deeper: str = "chained"
    counted: bool = True
    window: int | None = None


OWN_HEADS = DEEPSEEK | {"norm_out": "transformer.shared_head.norm", "lm_head": "transformer.shared_head.output"}
WRAPPED = Family("language_model.model.layers.{n}.", hidden="pre_norm", recycle="raw")
MIMO_NAMES = DEEPSEEK | {"norm_out": "final_layernorm"}
FAMILIES_THERE = {
    "kimi_k3": Family("model.layers.{n}.", hidden="pre_norm", recycle="raw"),
    "mimo_v2": Family("model.mtp.layers.{i}.", MIMO_NAMES, "pre_mlp_layernorm", 3, deeper="target", counted=False, window=5),
    "pangu_ultra_moe": Family("model.layers.{n}."),
    "step5": Family("model.layers.{n}.", OWN_HEADS, num_layers=3, hidden="pre_norm", recycle="raw"),
}
EACH = pytest.mark.parametrize("name", FAMILIES_THERE)


@pytest.fixture(autouse=True)
def _own_modules(monkeypatch, tmp_path):
    """What transformers copies of the code goes into the test's own folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def published(head, family, model):
    """The head's tensors under the family's names."""
    tensors = {}
    for index, layer in enumerate(head.layers):
        prefix = family.prefix.format(i=index, n=model.config.num_hidden_layers + index)
        tensors |= {f"{prefix}{theirs}.weight": getattr(layer, ours).weight for ours, theirs in family.names.items()}
        for name, tensor in layer.block.state_dict().items():
            tensors[prefix + name.replace("post_attention_layernorm", family.mlp_norm)] = tensor
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def base_of(family):
    """A Llama; or where the family's MTP layers slide, a model of whose layers only the first one does."""
    if family.window is None:
        return tiny.fill(LlamaForCausalLM(LlamaConfig(**tiny.DENSE)).eval(), seed=2)
    types = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": family.window, "head_dim": 8}
    return tiny.fill(MinistralForCausalLM(MinistralConfig(**tiny.DENSE, **types)).eval(), seed=2)


def write(folder, name, family, more="", **settings):
    """-> target, head's published tensors; the folder holds both, and the code."""
    model, base = base_of(family), "Ministral" if family.window else "Llama"
    tensors = published(tiny.build_head(model, ROWS[name], family.num_layers), family, model)
    model.save_pretrained(folder)
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "modeling_tiny.py").write_text(CODE.format(model_type=name, more=more, base=base))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": name, "auto_map": AUTO_MAP}
    config |= {"num_nextn_predict_layers": family.num_layers} if family.counted else {}
    (folder / "config.json").write_text(json.dumps(config | settings))
    return model, tensors


# ── the twin ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_layer(tensors, prefix, family, embeds, hidden):
    """One MTP layer around one of Llama's -> (normed, raw)."""

    def linear(x, name):
        return F.linear(x, tensors[f"{prefix}{name}.weight"])

    def norm(x, name):
        return rms_norm(x, tensors[f"{prefix}{name}.weight"], 1e-6)

    x = linear(torch.cat([norm(embeds, "enorm"), norm(hidden, "hnorm")], dim=-1), "eh_proj")
    inner = norm(x, "input_layernorm")
    query, key, value = (heads(inner, tensors[f"{prefix}self_attn.{part}_proj.weight"], 8) for part in "qkv")
    seen = causal_attention(rotated_halves(query, 10000.0), rotated_halves(key, 10000.0), value, 8**-0.5, family.window)
    x = x + linear(seen, "self_attn.o_proj")
    inner = norm(x, family.mlp_norm)
    x = x + linear(F.silu(linear(inner, "mlp.gate_proj")) * linear(inner, "mlp.up_proj"), "mlp.down_proj")
    return norm(x, family.names["norm_out"]), x


def states(model, ids, hidden):
    """The target's hidden states (n, D), before or after the final norm."""
    kept = []
    hook = model.model.norm.register_forward_hook(lambda _, inputs, output: kept.extend((inputs[0][0], output[0])))
    model(ids, use_cache=False)
    hook.remove()
    return kept[hidden == "post_norm"]


@torch.no_grad()
def drafts(model, tensors, family, text, num_steps):
    """The logits (num_steps, V) of drafts behind a text; past the last layer, that one again, row by row."""
    target_states = states(model, torch.tensor([text[:-1]]), family.hidden)
    hidden, tokens, logits, last = target_states, list(text[1:]), [], family.num_layers - 1
    for step in range(num_steps):
        prefix = family.prefix.format(i=min(step, last), n=model.config.num_hidden_layers + min(step, last))
        normed, raw = run_layer(tensors, prefix, family, model.get_input_embeddings()(torch.tensor(tokens)), hidden)
        own = family.names.get("lm_head")
        output = tensors[f"{prefix}{own}.weight"] if own else model.get_output_embeddings().weight
        logits.append(F.linear(normed[-1], output))
        tokens.append(int(logits[-1].argmax()))
        put_out = normed if family.recycle == "normed" else raw
        if step < last:
            hidden, tokens = target_states if family.deeper == "target" else put_out, tokens[1:]
        else:
            hidden = torch.cat([hidden, put_out[-1:]])
    return torch.stack(logits)


# ── with the code ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def assert_works(decoder, model, tensors, family, monkeypatch):
    """Greedy text is the target's; the logits of every draft step are the twin's."""
    text, steps, logits = tiny.prompts()[0], [], decoder.head.logits
    expected = tiny.alone(model, text, max_new_tokens=20)
    monkeypatch.setattr(decoder.head, "logits", lambda *args: steps.append(logits(*args)[0]) or logits(*args))
    said = []
    for chunk in decoder.stream(tiny.one(text), max_new_tokens=20, do_sample=False, num_speculative_tokens=3):
        error = (torch.stack(steps) - drafts(model, tensors, family, text + said, len(steps))).abs().amax(-1)
        assert float(error.max()) < 1e-4, f"the draft steps' logits are off by {error.tolist()}"
        steps.clear()
        said += chunk.tokens[0]
    assert said == expected
    assert decoder.metrics.tau > 1.1, f"{decoder.metrics}: no draft is kept"


@EACH
def test_with_the_checkpoints_own_code(name, tmp_path, monkeypatch):
    family = FAMILIES_THERE[name]
    model, tensors = write(tmp_path / "published", name, family)
    decoder = MTPDecoder.from_pretrained(tmp_path / "published", trust_remote_code=True)
    assert decoder.head.spec.family == name
    assert decoder.head.num_layers == family.num_layers
    assert type(decoder.target).__module__.startswith("transformers_modules"), "the class is the checkpoint's own"
    assert_works(decoder, model, tensors, family, monkeypatch)
    rows = tiny.prompts(4)
    batch = decoder.generate(**tiny.padded(rows), max_new_tokens=16, do_sample=False)
    tiny.assert_rows(batch, 9, [tiny.alone(model, row, max_new_tokens=16) for row in rows], name)


def test_a_target_loaded_by_hand_and_a_head_within_a_wrapper(tmp_path, monkeypatch):
    model, tensors = write(tmp_path / "published", "kimi_k3", WRAPPED)
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "published", trust_remote_code=True)
    assert_works(MTPDecoder.from_model(target), model, tensors, WRAPPED, monkeypatch)


@EACH
def test_saved_with_its_code(name, tmp_path):
    write(tmp_path / "published", name, FAMILIES_THERE[name])
    decoder = MTPDecoder.from_pretrained(tmp_path / "published", trust_remote_code=True)
    decoder.save_pretrained(tmp_path / "saved")
    again = MTPDecoder.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    for key, tensor in decoder.head.state_dict().items():
        assert torch.equal(again.head.state_dict()[key], tensor), key
    text = tiny.one(tiny.prompts()[0])
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(again.generate(text, **options), decoder.generate(text, **options))


# ── without it ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def refusal(folder, **kwargs):
    with pytest.raises(UnsupportedModelError) as caught:
        MTPDecoder.from_pretrained(folder, **kwargs)
    return str(caught.value)


@EACH
def test_without_leave_to_run_code(name, tmp_path):
    """What was asked for, what transformers lacks, what to type; the code is not run."""
    write(tmp_path / "published", name, FAMILIES_THERE[name], more='raise RuntimeError("this code was run")')
    said = refusal(tmp_path / "published")
    assert str(tmp_path / "published") in said
    assert f"transformers {transformers.__version__} has no such model" in said
    assert f"model_type={name!r}" in said
    assert "mtpdecode knows its MTP head" in said
    assert "pass trust_remote_code=True" in said


def test_without_any_code(tmp_path):
    write(tmp_path / "published", "kimi_k3", FAMILIES_THERE["kimi_k3"], auto_map=None)
    path = tmp_path / "published" / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "auto_map"}))
    said = refusal(tmp_path / "published")
    assert "no code comes with the checkpoint either" in said
    assert "MTPDecoder.from_model(model, head=" in said


def test_a_base_that_nobody_knows(tmp_path):
    write(tmp_path / "published", "kimi_k3", FAMILIES_THERE["kimi_k3"], model_type="kimi_k9")
    said = refusal(tmp_path / "published")
    assert "model_type='kimi_k9'" in said
    assert "mtpdecode knows its MTP head" not in said


DEAF = """
    def forward(self, *args, {ignored}=None, **kwargs):
        return super().forward(*args, **kwargs)
"""
OTHERWISE = {
    "masks": (DEAF.format(ignored="attention_mask"), "the logits of a rehearsal are off"),
    "positions": (DEAF.format(ignored="position_ids"), "the logits of a rehearsal are off"),
    "caches": (DEAF.format(ignored="past_key_values"), "it raises RuntimeError"),
    "the names of old": (
        """
    def forward(self, input_ids, attention_mask=None, past_key_value=None):
        return super().forward(input_ids)
""",
        "it raises TypeError",
    ),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_code_that_takes_things_otherwise(what, tmp_path):
    """It is tried out before it is trusted: such a model would write another text than its own `generate`."""
    more, says = OTHERWISE[what]
    write(tmp_path / "published", "kimi_k3", FAMILIES_THERE["kimi_k3"], more)
    said = refusal(tmp_path / "published", trust_remote_code=True)
    assert says in said
    assert "TinyForCausalLM was to be decoded" in said
    assert "model.generate()" in said


@pytest.mark.parametrize(
    ("more", "settings", "says"),
    [
        ("    _is_stateful = True", {}, "keeps a recurrent state"),
        ("", {"sliding_window": 8}, "has sliding_window=8 and no layer_types"),
    ],
    ids=["recurrent", "sliding"],
)
def test_code_whose_layers_nobody_can_know(more, settings, says, tmp_path):
    """A recurrent state, or a window in some of the layers: exact or refused, never wrong."""
    write(tmp_path / "published", "kimi_k3", FAMILIES_THERE["kimi_k3"], more, **settings)
    said = refusal(tmp_path / "published", trust_remote_code=True)
    assert says in said
    assert "model.generate()" in said
