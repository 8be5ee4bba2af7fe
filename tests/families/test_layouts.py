"""Heads come from real layouts under real names, in one file or many, for any number of layers, and go back into them."""

import json
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtpdecode import MTPDecoder, MTPSpec, RaggedCache, UnsupportedModelError, families, save_head
from mtpdecode.loading import load_target
from tests import tiny
from tests.families.test_zoo import built, write_case
from tests.families.zoo import glm_ocr, mellum

LENGTH = 16
LAYOUTS = ("llama", "sliding", "mimo", "glm4_moe", "deepseek_v3")

DENSE_BLOCK = """input_layernorm.weight post_attention_layernorm.weight self_attn.q_proj.weight self_attn.k_proj.weight
self_attn.v_proj.weight self_attn.o_proj.weight"""
MLP = "mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight"
BIASES = "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias"
MIXTURE = """mlp.gate.weight mlp.gate.e_score_correction_bias mlp.shared_experts.gate_proj.weight
mlp.shared_experts.up_proj.weight mlp.shared_experts.down_proj.weight """ + " ".join(
    f"mlp.experts.{expert}.{part}_proj.weight" for expert in range(4) for part in ("gate", "up", "down")
)
DEEPSEEK_AROUND = "enorm.weight hnorm.weight eh_proj.weight shared_head.norm.weight"
COPIES = "embed_tokens.weight shared_head.head.weight"
LATENT_BLOCK = """input_layernorm.weight post_attention_layernorm.weight self_attn.q_a_proj.weight self_attn.q_a_layernorm.weight
self_attn.q_b_proj.weight self_attn.kv_a_proj_with_mqa.weight self_attn.kv_a_layernorm.weight self_attn.kv_b_proj.weight
self_attn.o_proj.weight"""
MIMO_AROUND = "token_layernorm.weight hidden_layernorm.weight input_proj.weight final_layernorm.weight"

PUBLISHED = {
    "llama": ("model.layers.2.", f"{DEEPSEEK_AROUND} {DENSE_BLOCK} {MLP}"),
    "sliding": ("model.layers.2.", f"{DEEPSEEK_AROUND} {DENSE_BLOCK} {BIASES} {MLP}"),
    "mimo": ("model.mtp_layers.0.", f"{MIMO_AROUND} {DENSE_BLOCK} {BIASES} {MLP}"),
    "glm4_moe": ("model.layers.2.", f"{DEEPSEEK_AROUND} {COPIES} {DENSE_BLOCK} {MIXTURE}"),
    "deepseek_v3": ("model.layers.2.", f"{DEEPSEEK_AROUND} {COPIES} {LATENT_BLOCK} {MIXTURE}"),
}
"""The names in a checkpoint with two base layers, as the families publish them."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(name, layers, shards) -> a folder in the family's layout, written once."""
    folders = {}

    def write(name, num_layers=1, num_shards=1):
        key = name, num_layers, num_shards
        if key not in folders:
            folder = tmp_path_factory.mktemp("checkpoints") / "-".join(map(str, key))
            folders[key] = tiny.write_checkpoint(folder, tiny.target(name), tiny.head(name, num_layers), num_shards)
        return folders[key]

    return write


def names_in(folder):
    names = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names += list(file.keys())
    return set(names)


def assert_same_head(found, wanted):
    assert found.num_layers == wanted.num_layers
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), f"{name} is not the tensor that was written"


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_names_are_the_published_ones(name, written):
    prefix, names = PUBLISHED[name]
    head_names = {found for found in names_in(written(name)) if found.startswith(prefix)}
    assert head_names == {prefix + each for each in names.split()}, "the tiny checkpoints must be laid out as the real ones"


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_in_one_line(name, num_layers, num_shards, written):
    folder = written(name, num_layers, num_shards)
    decoder = MTPDecoder.from_pretrained(folder, num_speculative_tokens=3)
    assert_same_head(decoder.head, tiny.head(name, num_layers))
    assert decoder.head.spec.family == tiny.ROWS.get(name, name)
    assert not decoder.head.training
    for tensor, same in ((decoder.target.state_dict()[key], value) for key, value in tiny.target(name).state_dict().items()):
        assert torch.equal(tensor, same), "the base came back changed"
    rows = tiny.prompts(3)
    sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=LENGTH, do_sample=False)
    tiny.assert_rows(sequences, 9, [tiny.plain(name, row, max_new_tokens=LENGTH) for row in rows], f"{name} from disk")


@pytest.mark.parametrize("name", ["llama", "sliding", "glm4_moe", "deepseek_v3"])
def test_a_model_that_the_user_loaded_brings_its_head(name, written):
    model = AutoModelForCausalLM.from_pretrained(written(name, 2, 3))
    decoder = MTPDecoder.from_model(model)
    assert decoder.target is model
    assert_same_head(decoder.head, tiny.head(name, 2))
    assert decoder.options.schedule.start == 2, "K is the head's number of layers unless asked otherwise"


def test_mimo_is_qwen2_with_its_own_rotary_base(written):
    """Its config.json is of another time, and names code that is never run."""
    raw = json.loads((written("mimo") / "config.json").read_text())
    assert raw["model_type"] == "mimo"
    assert "rope_parameters" not in raw
    model = load_target(written("mimo"))
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.config.rope_parameters["rope_theta"] == 640000, f"rope_theta was lost: {model.config.rope_parameters}"
    assert model.config.rms_norm_eps == 1e-5
    assert MTPDecoder.from_model(model).head.spec.family == "mimo", "model_type is qwen2 now; the tensors say mimo"


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("num_target_layers", [1, 3])
def test_any_number_of_base_layers(name, num_target_layers, tmp_path):
    layers = {"first_k_dense_replace": num_target_layers - 1} if "first_k_dense_replace" in tiny.TARGETS[name][2] else {}
    model = tiny.build(name, num_hidden_layers=num_target_layers, **layers)
    head = tiny.build_head(model, tiny.row_of(name), 2)
    decoder = MTPDecoder.from_pretrained(tiny.write_checkpoint(tmp_path / name, model, head, 2), num_speculative_tokens=3)
    assert_same_head(decoder.head, head)
    row = tiny.prompts()[0]
    expected = tiny.alone(model, row, max_new_tokens=LENGTH)
    assert decoder.generate(tiny.one(row), max_new_tokens=LENGTH, do_sample=False).tolist() == [row + expected]


def test_the_dtype_that_is_asked_for(written):
    decoder = MTPDecoder.from_pretrained(written("llama"), dtype=torch.bfloat16)
    assert decoder.target.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in decoder.head.parameters()} == {torch.bfloat16}, "the head follows its target"
    batch = tiny.padded(tiny.prompts())
    assert decoder.generate(**batch, max_new_tokens=4).shape == (5, 13)


def test_settings_go_to_the_decoder_and_the_rest_to_transformers(written):
    spec = tiny.row_of("mimo").replace(hidden="post_norm")
    decoder = MTPDecoder.from_pretrained(
        written("mimo"),
        spec=spec,
        num_speculative_tokens=4,
        acceptance="block",
        draft_sampling="greedy",
        attn_implementation="eager",
    )
    assert decoder.head.spec.hidden == "post_norm", "spec= was not taken"
    assert decoder.options.schedule.choices == (4,)
    assert (decoder.options.acceptance, decoder.options.draft_sampling) == ("block", "greedy")
    assert decoder.target.config._attn_implementation == "eager"


# ── heads that lie elsewhere ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_head_saved_alone_comes_back(name, tmp_path):
    head, model = tiny.head(name, 2), tiny.target(name)
    save_head(head, tmp_path / "head")
    written = load_file(tmp_path / "head" / "model.safetensors")
    wanted = tiny.head_in_layout(head, model)
    copies = {each for each in wanted if each.endswith(("embed_tokens.weight", "shared_head.head.weight"))}
    assert written.keys() == wanted.keys() - copies, "a saved head has the family's names, and no copies of the target's tensors"
    assert all(torch.equal(tensor, wanted[each]) for each, tensor in written.items())
    assert_same_head(MTPDecoder.from_model(model, head=tmp_path / "head").head, head)
    assert_same_head(MTPDecoder.from_model(model, head=str(tmp_path / "head")).head, head)


def test_a_draft_vocabulary_and_k_travel_with_the_head(tmp_path):
    some = torch.tensor([3, 4, 8, 11, 30, 35])
    head = tiny.build_head(tiny.target("llama"), tiny.row_of("llama"), draft_vocabulary=some)
    head.num_speculative_tokens = 3
    save_head(head, tmp_path / "head")
    decoder = MTPDecoder.from_model(tiny.target("llama"), head=tmp_path / "head")
    assert decoder.head.draft_vocabulary.tolist() == some.tolist()
    assert decoder.options.schedule.start == 3, "trained for three steps"
    assert_same_head(decoder.head, head)


def test_the_head_of_another_checkpoint(written, tmp_path):
    """A fine-tuned model has lost its head; the original repository still has it."""
    bare = tiny.write_checkpoint(tmp_path / "tuned", tiny.target("glm4_moe"))
    decoder = MTPDecoder.from_pretrained(bare, head=written("glm4_moe", 1, 3))
    assert_same_head(decoder.head, tiny.head("glm4_moe"))


def test_experts_that_are_already_stacked_are_read_too(tmp_path):
    head, model = tiny.head("glm4_moe"), tiny.target("glm4_moe")
    block = head.layers[0].block.state_dict()
    prefix = "model.layers.2."
    single = {name: None for name in tiny.head_in_layout(head, model) if ".mlp.experts." in name}
    stacked = {prefix + name: block[name] for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")}
    folder = tiny.write_checkpoint(tmp_path / "stacked", model, head, **single, **stacked)
    assert_same_head(MTPDecoder.from_model(model, head=folder).head, head)


def test_gate_and_up_may_lie_apart(tmp_path):
    """GLM-OCR's layers hold them in one matrix, and not every checkpoint does."""

    def parted(tensors):
        name = next(name for name in tensors if name.endswith("gate_up_proj.weight"))
        halves = tensors.pop(name).chunk(2)
        return tensors | {name.replace("gate_up", part): half.clone() for part, half in zip(("gate", "up"), halves, strict=True)}

    case = glm_ocr.CASES[0]
    folder = write_case(tmp_path / "apart", case, parted)
    assert_same_head(MTPDecoder.from_model(built(case)[0], head=folder).head, built(case)[1])


def test_a_block_like_no_layer_of_the_target(tmp_path):
    """Mellum's MTP layer has a sliding window unless the config says otherwise; this base has none to build it like."""
    folder = write_case(tmp_path / "mellum", mellum.CASES[0])
    model = mellum.build(layer_types=["full_attention"] * 3)
    with pytest.raises(UnsupportedModelError) as caught:
        MTPDecoder.from_model(model, head=folder)
    assert "built like a sliding_attention layer, and the target has only full_attention" in str(caught.value)


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_saving_target_and_head_together(name, num_shards, written, tmp_path):
    decoder = MTPDecoder.from_pretrained(written(name, 2, num_shards), num_speculative_tokens=3, cache=RaggedCache)
    decoder.save_pretrained(tmp_path / "saved")
    again = MTPDecoder.from_pretrained(tmp_path / "saved", num_speculative_tokens=3)
    assert_same_head(again.head, decoder.head)
    assert again.head.spec == decoder.head.spec, "a MiMo that was saved as Qwen2 is still a MiMo"
    for key, value in decoder.target.state_dict().items():
        assert torch.equal(again.target.state_dict()[key], value), f"{key} of the target"
    batch, options = tiny.padded(tiny.prompts()), {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(again.generate(**batch, **options), decoder.generate(**batch, **options)), "and the object still works"


@pytest.mark.parametrize("shard_size", ["50GB", "30KB"])
def test_transformers_reads_what_we_saved(shard_size, written, tmp_path, monkeypatch):
    """The target alone, by AutoModelForCausalLM, from one file and from several."""
    decoder = MTPDecoder.from_pretrained(written("llama"))
    monkeypatch.setattr(decoder.target, "save_pretrained", partial(decoder.target.save_pretrained, max_shard_size=shard_size))
    decoder.save_pretrained(tmp_path / "saved")
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 2) == (shard_size == "30KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for key, value in tiny.target("llama").state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert_same_head(MTPDecoder.from_model(model).head, tiny.head("llama"))


def test_a_target_whose_embedding_is_its_output_layer(tmp_path):
    """As small models have it: the checkpoint holds one tensor for both, and the head uses the same."""
    model = tiny.build("llama", tie_word_embeddings=True)
    head = tiny.build_head(model, tiny.row_of("llama"), 2)
    folder = tiny.write_checkpoint(tmp_path / "tied", model, head)
    assert "lm_head.weight" not in names_in(folder)
    decoder = MTPDecoder.from_pretrained(folder, num_speculative_tokens=3)
    assert_same_head(decoder.head, head)
    row = tiny.prompts()[0]
    expected = tiny.alone(model, row, max_new_tokens=LENGTH)
    assert decoder.generate(tiny.one(row), max_new_tokens=LENGTH, do_sample=False).tolist() == [row + expected]
    decoder.save_pretrained(tmp_path / "again")
    assert_same_head(MTPDecoder.from_pretrained(tmp_path / "again").head, head)


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_family_is_a_row(tmp_path):
    """Names, order and prefix of nobody's, given as data: nothing else is needed."""
    names = (("e_norm", "norm_embed"), ("h_norm", "norm_hidden"), ("mixer", "proj"), ("last_norm", "norm_out"))
    spec = MTPSpec("mine", ("mine",), "extra.heads.{i}.", names, num_layers_keys=("num_extra_heads",), combine="hidden_embed")
    model = tiny.target("mistral")
    head = tiny.build_head(model, spec, 2)
    save_head(head, tmp_path / "mine")
    written = names_in(tmp_path / "mine")
    assert "extra.heads.1.mixer.weight" in written
    assert "extra.heads.0.self_attn.q_proj.weight" in written
    decoder = MTPDecoder.from_model(model, head=tmp_path / "mine", spec=spec)
    assert_same_head(decoder.head, head)
    row = tiny.prompts()[0]
    expected = tiny.plain("mistral", row, max_new_tokens=LENGTH)
    assert decoder.generate(tiny.one(row), max_new_tokens=LENGTH, do_sample=False).tolist() == [row + expected]


def test_the_table_says_what_a_reader_needs():
    rows = {row["family"]: row for row in families()}
    assert {"deepseek_v3", "glm4_moe", "mimo", "llama"} <= rows.keys()
    for family, row in rows.items():
        assert all(row[key] for key in ("model_types", "examples", "config_field", "tensors", "verified", "source")), family
    assert rows["mimo"]["tensors"] == "model.mtp_layers.{i}.*"
    assert rows["mimo"]["combine"] == "hidden_embed"
    rows["mimo"].clear()
    assert {row["family"]: row for row in families()}["mimo"], "a reader's changes must not reach the table"
