"""Attention that chooses its keys: what must not be chosen never is, planted faults are seen, choices are shared on demand."""

import copy
import json
from functools import cache, partial
from inspect import signature

import pytest
import torch
from safetensors.torch import save_file
from transformers import Cache, DynamicCache
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLIndexer

from mtpdecode import CropCache, MTPDecoder, MTPHead, RaggedCache, UnsupportedModelError
from mtpdecode import cache as cache_module
from mtpdecode.cache import CacheLayout
from mtpdecode.indexer import Choices, chosen, narrowed
from mtpdecode.layers import layer_windows
from mtpdecode.state import Window
from tests import tiny
from tests.families.zoo import deepseek_v32, glm_moe_dsa, minimax_m3_vl

FULL = CacheLayout({"full_attention": None}, "sdpa", torch.float32)
CPU = torch.device("cpu")
BUILDERS = {
    "deepseek_v32": deepseek_v32.build,
    "glm_moe_dsa": partial(glm_moe_dsa.build, **glm_moe_dsa.SAVING),
    "minimax_m3_vl": minimax_m3_vl.build_bare,
}


@cache
def built(family):
    """(target, head), for all tests."""
    model = BUILDERS[family]()
    row = next(row for row in tiny.FAMILIES if row.family == family)
    return model, tiny.build_head(model, row)


def decoder(family, cache=RaggedCache, **changes):
    """A decoder over the shared target and head, some choices of whose row are changed."""
    model, head = built(family)
    if changes:
        head, old = MTPHead(model, head.spec.replace(**changes)).eval(), head
        head.load_state_dict(old.state_dict())
    return MTPDecoder.from_model(model, head=head, num_speculative_tokens=3, cache=cache)


# ── the cache ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def index(window, value):
    """Write an indexer's keys that all have one value; -> those that it scores, (B, slots)."""
    rows, length = window.positions.shape
    states = torch.full((rows, length, 1), float(value))
    window.cache.update(states[:, None], states[:, None].clone(), 0)
    return window.cache.update_indexer(states, 0)[..., 0]


def test_an_indexers_keys_lie_at_every_rows_own_slots():
    ragged = RaggedCache(FULL, 1, 2, CPU)
    ragged.reserve(8)
    index(ragged.window(4), 1)
    ragged.commit(torch.tensor([4, 1]))
    seen = index(ragged.window(2), 2)
    assert seen[0, :6].tolist() == [1, 1, 1, 1, 2, 2]
    assert seen[1, :6].tolist() == [1, 2, 2, 1, 0, 0], "behind row 1 lie what was not committed, and slots nobody wrote"


def test_an_indexers_keys_are_cropped_with_the_others():
    """As transformers' own cache for such layers would hold them, rejected ones taken back."""
    cropped, theirs = CropCache(FULL, 1, 1, CPU), DynamicCache(config=built("deepseek_v32")[0].config)
    index(cropped.window(4), 1)
    cropped.commit(torch.tensor([2]))
    assert index(cropped.window(2), 2)[0].tolist() == [1, 1, 2, 2]
    index(Window(torch.arange(4)[None], None, theirs), 1)
    theirs.layers[0].crop(-2)
    assert index(Window(torch.arange(2)[None], None, theirs), 2)[0].tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", BUILDERS)
def test_ragged_rows_write_what_each_would_alone(family, attention):
    """In a batch and behind rejected drafts, with masks of both kinds."""
    model = copy.deepcopy(built(family)[0])
    model.set_attn_implementation(attention)
    rows, options = tiny.prompts(4), {"max_new_tokens": 24, "do_sample": False}
    expected = [tiny.alone(model, row, max_new_tokens=24) for row in rows]
    head = MTPHead(model, built(family)[1].spec).eval()
    head.load_state_dict(built(family)[1].state_dict())
    found = MTPDecoder.from_model(model, head=head, num_speculative_tokens=3).generate(**tiny.padded(rows), **options)
    tiny.assert_rows(found, 9, expected, f"{family}, {attention}")


# ── planted faults ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def all_visible(forward, self, hidden_states, q_resid, position_embeddings, attention_mask, *args, **kwargs):
    """The indexer scores stale and unwritten slots too. Attention itself is masked as it should be."""
    return forward(self, hidden_states, q_resid, position_embeddings, torch.ones_like(attention_mask), *args, **kwargs)


def all_past(forward, self, *args, **kwargs):
    """The same for blocks, which are told from the future by positions: every slot is taken for a past one."""
    given = signature(forward).bind(self, *args, **kwargs)
    cache = next(value for value in given.arguments.values() if isinstance(value, Cache))
    late = torch.full_like(given.arguments["position_ids"], cache.get_seq_length(self.layer_idx) - 1)
    given.arguments["position_ids"] = late
    return forward(*given.args, **given.kwargs)


def first_row_only(self, idx_k):
    """Every row's index keys land where the first row's belong."""
    written = self._slots.written
    self._slots.written = written[:1].expand_as(written)
    try:
        return _update_index(self, idx_k)
    finally:
        self._slots.written = written


_update_index = cache_module._RaggedLayer.update_index


@pytest.mark.parametrize("fault", ["stale slots are visible", "another row's slots"])
@pytest.mark.parametrize("family", ["deepseek_v32", "minimax_m3_vl"])
def test_a_planted_fault_is_seen(family, fault, monkeypatch):
    """The comparison with plain decoding, which all families pass, fails with an indexer that sees what it must not."""
    rows, options = tiny.prompts(4), {"max_new_tokens": 24, "do_sample": False}
    batch, expected = tiny.padded(rows), [tiny.alone(built(family)[0], row, max_new_tokens=24) for row in rows]
    tiny.assert_rows(decoder(family).generate(**batch, **options), 9, expected, "without the fault")
    if fault == "another row's slots":
        monkeypatch.setattr(cache_module._RaggedLayer, "update_index", first_row_only)
    else:
        indexer, seen = {"deepseek_v32": (DeepseekV32Indexer, all_visible), "minimax_m3_vl": (MiniMaxM3VLIndexer, all_past)}[
            family
        ]
        forward = indexer.forward
        monkeypatch.setattr(indexer, "forward", lambda self, *args, **kwargs: seen(forward, self, *args, **kwargs))
    with pytest.raises(AssertionError, match="plain decoding of that row alone"):
        tiny.assert_rows(decoder(family).generate(**batch, **options), 9, expected, f"{family}: {fault}")


def test_an_indexer_that_nobody_has_looked_at_is_refused_by_name():
    """Some with the same layer type go by the cache's length, which ragged rows do not have."""
    config = copy.deepcopy(built("deepseek_v32")[0].config)
    assert list(layer_windows(config, "Known").values()) == [None]
    config.model_type = "another"
    with pytest.raises(UnsupportedModelError, match=config.layer_types[0]):
        layer_windows(config, "Another")


# ── one choice for all draft steps ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_the_drawing_of_a_choice_that_is_kept(kind):
    """Row 0's last query chose slots 3 and 0 of the four it sees; row 1's sees slot 0 alone: its other choice does not count."""
    seen = torch.tensor([[[1, 1, 1, 1, 0, 0]], [[1, 0, 0, 0, 0, 0]]]).bool().repeat(1, 2, 1)[:, None]
    additive = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    window = Window(torch.zeros(2, 2), seen if kind == "bool" else additive, DynamicCache())
    choice = torch.tensor([[[1, 2], [3, 0]], [[0, 5], [1, 2]]], dtype=torch.int32)
    kept = chosen(choice, window, counts=torch.tensor([2, 1]))
    assert kept.int().tolist() == [[1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    mask = torch.ones(2, 1, 1, 7).bool() if kind == "bool" else torch.zeros(2, 1, 1, 7)
    later = narrowed(window._replace(mask=mask), kept).mask
    assert later.dtype == mask.dtype
    assert (later if kind == "bool" else later == 0)[:, 0, 0].int().tolist() == [[1, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]


def logits_of_a_round(family, text, monkeypatch, cache=RaggedCache, **changes):
    """The head's logits of one round behind a text, (3, V)."""
    each = decoder(family, cache, **changes)
    logits, steps = each.head.logits, []
    monkeypatch.setattr(each.head, "logits", lambda *args: steps.append(logits(*args)[0]) or logits(*args))
    next(each.stream(tiny.one(text), max_new_tokens=8, do_sample=False))
    monkeypatch.undo()
    return torch.stack(steps)


@pytest.mark.parametrize("cache", [RaggedCache, CropCache])
@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_later_steps_keep_to_the_first_ones_choice(family, cache, monkeypatch):
    """Held to the twin that shares: the first step is the same either way, the later ones are not."""
    model, head = built(family)
    text = tiny.prompts(1, lengths=(20,))[0]
    tensors = {name: tensor.detach() for name, tensor in deepseek_v32.LAYOUT.published(head, model).items()}
    twin = partial({"deepseek_v32": deepseek_v32, "glm_moe_dsa": glm_moe_dsa}[family].CASES[0].drafts, model, tensors, text, 3)
    found = {
        choice: logits_of_a_round(family, text, monkeypatch, cache, index_choice=choice) for choice in ("first_step", "each_step")
    }
    with torch.no_grad():
        assert (found["first_step"] - twin(shares=True)).abs().max() < 1e-4
        assert (found["each_step"] - twin()).abs().max() < 1e-4
    assert torch.equal(found["first_step"][0], found["each_step"][0])
    assert (found["first_step"][1] - found["each_step"][1]).abs().max() > 1e-2, "else this test shows nothing"


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_the_config_says_whether_choices_are_shared(family):
    """GLM-5.2 does, DeepSeek-V3.2 does not say: every step chooses."""
    assert len(decoder(family).head.indexers) == (family == "glm_moe_dsa")


def test_nothing_is_recorded_behind_the_first_step():
    indexer = torch.nn.Identity()
    choices = Choices([indexer])
    with choices.listening():
        indexer(torch.zeros(1))
        choices.wanted()
        indexer(torch.ones(1))
        taken = choices.taken()
        indexer(torch.zeros(1))
    assert taken.tolist() == [1.0]
    choices.wanted()
    indexer(torch.zeros(1))
    assert choices.taken() is None, "nobody listens"


def test_a_shared_choice_of_keys_where_none_are_chosen_is_refused():
    model, head = built("minimax_m3_vl")
    with pytest.raises(UnsupportedModelError, match=r"minimax_m3_sparse.*index_choice='each_step'"):
        MTPHead(model, head.spec.replace(index_choice="first_step"))


# ── MiniMax-M3 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prefix", ["model.mtp.layers.{i}.", "language_model.model.mtp.layers.{i}."])
def test_a_checkpoint_of_the_mtp_modules_alone(prefix, tmp_path):
    """Its config is flat and knows nothing of images; the target is the one that does."""
    model = minimax_m3_vl.build()
    head = tiny.build_head(model, built("minimax_m3_vl")[1].spec)
    save_file(minimax_m3_vl.published(minimax_m3_vl.layout(prefix), head, model), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "minimax_m3_mtp", "num_mtp_modules": 1}))
    found = MTPDecoder.from_model(model, head=tmp_path).head
    for name, tensor in head.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_the_block_is_sparse_whatever_the_targets_last_layer_is():
    """vLLM forces sparse attention and experts; a target without a sparse layer cannot have the head."""
    last = {
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "dense"],
    }
    text = minimax_m3_vl.MiniMaxM3VLTextConfig(**(minimax_m3_vl.TEXT | last))
    block = MTPHead(minimax_m3_vl.MiniMaxM3VLForCausalLM(text), built("minimax_m3_vl")[1].spec).layers[0].block
    assert block.self_attn.indexer is not None
    assert type(block.mlp).__name__ == "MiniMaxM3VLSparseMoeBlock"
    dense = minimax_m3_vl.MiniMaxM3VLTextConfig(**(minimax_m3_vl.TEXT | {"layer_types": ["full_attention"] * 3}))
    with pytest.raises(UnsupportedModelError, match="minimax_m3_sparse"):
        MTPHead(minimax_m3_vl.MiniMaxM3VLForCausalLM(dense), built("minimax_m3_vl")[1].spec)
