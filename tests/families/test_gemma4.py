"""Gemma 4: drafts from an assistant that reads the target's keys, and prompts with images."""

import copy
from collections import Counter
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma4TextConfig

import mtpdecode
from mtpdecode import (
    CacheError,
    CropCache,
    DraftSchedule,
    GenerationError,
    HeadWeightsError,
    KVCacheManager,
    MTPDecoder,
    NGramProposer,
    RaggedCache,
    UnsupportedModelError,
)
from mtpdecode.families import families
from mtpdecode.testing import assert_counts, continuation_law, first_tokens
from tests import tiny
from tests.families import gemma4
from tests.families.gemma4 import IMAGE, NAMES, NUM_SOFT_TOKENS, WINDOW
from tests.families.test_zoo import removed, renamed, reshaped
from tests.families.zoo import cases

NUM_TOKENS, LENGTHS, GREEDY = 64, (9, 1, 4, 7), {"do_sample": False}
EVERY = pytest.mark.parametrize("name", NAMES)
WITH_IMAGES = pytest.mark.parametrize("name", [name for name in NAMES if name != "e2b"])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """name -> the folder of its assistant, written once."""
    return cache(lambda name: gemma4.write(tmp_path_factory.mktemp("gemma4") / name, name))


@pytest.fixture(scope="module")
def loaded(written):
    """name -> a decoder over the shared target, its assistant loaded once."""
    return cache(lambda name: MTPDecoder.from_model(gemma4.target(name), assistant=written(name)))


@cache
def plain(name, row, num_tokens=NUM_TOKENS):
    """What `model.generate` makes of a row alone."""
    return tiny.alone(gemma4.target(name), list(row), max_new_tokens=num_tokens)


def prompts(lengths=LENGTHS):
    return tiny.prompts(len(lengths), lengths=lengths)


def refused(error, call, *parts):
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"


# ── what is decoded is what the target says ─────────────────────────────────────────────────────────────────────────────────


@EVERY
@pytest.mark.parametrize("num_speculative_tokens", [1, 2, 4])
def test_greedy_text_is_that_of_generate(name, num_speculative_tokens, loaded):
    decoder, rows = loaded(name), prompts()
    options = GREEDY | {"max_new_tokens": NUM_TOKENS, "num_speculative_tokens": num_speculative_tokens}
    expected = [plain(name, tuple(row)) for row in rows]
    tiny.assert_rows(decoder.generate(**tiny.padded(rows), **options), max(LENGTHS), expected, f"{name}, ragged batch")
    for manager in (RaggedCache, CropCache):
        alone = MTPDecoder.from_model(decoder.target, assistant=decoder.assistant, cache=manager)
        found = alone.generate(tiny.one(rows[0]), **options)
        tiny.assert_rows(found, len(rows[0]), expected[:1], f"{name} alone on {manager.__name__}")


@EVERY
def test_drafts_are_kept_and_refused_at_every_position(name, loaded):
    decoder = loaded(name)
    decoder.generate(**tiny.padded(tiny.prompts(12, seed=1)), max_new_tokens=NUM_TOKENS // 2, num_speculative_tokens=3, **GREEDY)
    rates = decoder.metrics.acceptance_rate()
    assert all(0.2 <= rate <= 0.9 for rate in rates), f"{decoder.metrics} would test one branch only"
    by_count = decoder.metrics.histogram().sum(0)[1:].tolist()
    assert all(by_count), f"of rounds that append 1, 2, 3 and 4 tokens there were {by_count}; each must occur"


@pytest.mark.parametrize("draft_sampling", ["sample", "greedy"])
@pytest.mark.parametrize("name", ["e2b", "moe"])
def test_the_law_of_sampled_text_is_the_targets(name, draft_sampling, loaded):
    """Four tests with a false-alarm rate of 1e-4 each; 1500 rows of two ragged prompts. The ordered head's q is mostly 0."""
    decoder, (first, _, second, _), options = loaded(name), prompts(), {"temperature": 0.9, "top_k": 3}
    rows, num = [first, second], 750
    inputs = {key: tensor.repeat(num, 1) for key, tensor in tiny.padded(rows).items()}
    how = {"max_new_tokens": 6, "do_sample": True, "seed": 0, "num_speculative_tokens": 2, "draft_sampling": draft_sampling}
    texts = first_tokens(decoder, inputs, 3, **how, **options)
    for place, row in enumerate(rows):
        law = continuation_law(decoder.target, row, 3, **options)
        assert_counts(Counter(texts[place::2]), law, setting=f"{name}, row {place}")


@pytest.mark.parametrize("name", ["e2b", "moe"])
def test_text_that_leaves_the_window_behind(name, loaded):
    """200 tokens, ragged, over a window of 32; drafts stay as good as they were."""
    decoder, rows = loaded(name), prompts((29, 3, 40, 11))
    options = GREEDY | {"max_new_tokens": 200, "num_speculative_tokens": 3}
    expected = [plain(name, tuple(row), 200) for row in rows]
    found = decoder.generate(**tiny.padded(rows), **options)
    tiny.assert_rows(found, 40, expected, name)
    rates = decoder.metrics.acceptance_rate()
    assert all(0.2 <= rate <= 0.9 for rate in rates), f"behind the window the drafts are {decoder.metrics}"


class Changing(DraftSchedule):
    """Plain rounds between drafts of different lengths."""

    choices = (0, 1, 3)

    def __init__(self):
        self.round = 0

    def next_length(self, metrics):
        self.round += 1
        return (3, 0, 1, 0, 0)[self.round % 5]


@pytest.mark.parametrize("name", ["e2b", "moe"])
def test_a_draft_whose_length_changes(name, loaded):
    rows = prompts()
    expected = [plain(name, tuple(row)) for row in rows]
    found = loaded(name).generate(**tiny.padded(rows), max_new_tokens=NUM_TOKENS, num_speculative_tokens=Changing(), **GREEDY)
    tiny.assert_rows(found, max(LENGTHS), expected, f"{name}, K changing")
    assert loaded(name).metrics.acceptance_rate()[0] > 0.2, f"{loaded(name).metrics}: behind plain rounds drafts are no worse"


def test_a_length_that_is_measured(loaded, capsys):
    decoder, row = loaded("e2b"), prompts()[0]
    auto = MTPDecoder.from_model(decoder.target, assistant=decoder.assistant, num_speculative_tokens="auto")
    auto.warmup(progress=False)
    assert auto.generate(tiny.one(row), max_new_tokens=32, **GREEDY).tolist() == [row + plain("e2b", tuple(row))[:32]]
    auto.explain()
    assert capsys.readouterr().out


def test_prompts_of_one_token_leave_nothing_to_look_at(loaded):
    rows = [[7], [9], [30]]
    expected = [plain("e2b", tuple(row)) for row in rows]
    found = loaded("e2b").generate(**tiny.padded(rows), max_new_tokens=NUM_TOKENS, num_speculative_tokens=2, **GREEDY)
    tiny.assert_rows(found, 1, expected, "prompts of one token")


@pytest.mark.parametrize("name", ["e2b", "moe"])
def test_eager_attention_chosen_between_two_calls(name, written):
    model, row = copy.deepcopy(gemma4.target(name)), prompts()[0]
    decoder = MTPDecoder.from_model(model, assistant=written(name), num_speculative_tokens=3)
    options = {"max_new_tokens": 24} | GREEDY
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert decoder.generate(tiny.one(row), **options).tolist() == model.generate(tiny.one(row), **options).tolist()
        assert decoder.metrics.tau > 1.2, f"{implementation}: {decoder.metrics}, so the assistant's mask is another"


def test_an_embedding_that_is_the_output_layer(written):
    model, row = gemma4.build("e2b", tie_word_embeddings=True), prompts()[0]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    decoder = MTPDecoder.from_model(model, assistant=written("e2b"))
    found = decoder.generate(tiny.one(row), max_new_tokens=24, **GREEDY)
    assert found.tolist() == [row + tiny.alone(model, row, max_new_tokens=24)]


# ── what the assistant computes ─────────────────────────────────────────────────────────────────────────────────────────────


def recorded(decoder, monkeypatch, text, num_tokens=12, **prompt):
    """Decode greedily; -> per round, the text that it began with and the assistant's logits (K, V)."""
    steps, rounds, logits = [], [], decoder.assistant.logits
    monkeypatch.setattr(decoder.assistant, "logits", lambda normed: steps.append(logits(normed)[0]) or logits(normed))
    for chunk in decoder.stream(tiny.one(text), max_new_tokens=num_tokens, num_speculative_tokens=3, **prompt, **GREEDY):
        rounds.append((list(text), torch.stack(steps)))
        steps.clear()
        text = text + chunk.tokens[0]
    return rounds


def largest_error(rounds, twin, **prompt):
    """Over all rounds and draft steps; infinite where one scores a token that the other does not."""
    errors = []
    for text, found in rounds:
        wanted = twin.drafts(text, len(found), **prompt)
        errors.append(torch.where(found.isinf() & wanted.isinf(), 0.0, (found - wanted).abs()).max())
    return float(torch.stack(errors).max())


@EVERY
@pytest.mark.parametrize("length", [6, WINDOW + 13])
def test_logits_of_every_step_are_those_of_an_independent_twin(name, length, loaded, monkeypatch):
    rounds = recorded(loaded(name), monkeypatch, prompts((length,))[0])
    assert len(rounds) > 2, "several rounds, so that refused drafts lie in the target's cache"
    error = largest_error(rounds, gemma4.Twin(name))
    assert error < 1e-4, f"{name} behind {length} tokens: off by {error}"


@EVERY
def test_the_twin_can_tell(name, loaded, monkeypatch):
    """A window wider by one, a position further by one, an embedding without its scale, a key of another layer: each is seen."""
    rounds = recorded(loaded(name), monkeypatch, prompts((WINDOW + 13,))[0])

    class Late(gemma4.Twin):
        def attention(self, x, part, kind, pair, position):
            return super().attention(x, part, kind, pair, position - 1)

    class Swapped(gemma4.Twin):
        def state(self, pair, keys, position):
            return super().state(torch.cat([pair[len(pair) // 2 :], pair[: len(pair) // 2]]), keys, position)

    class Unturned(gemma4.Twin):
        def attention(self, x, part, kind, pair, position):
            return super().attention(x, part, kind, (pair[0].flip(-1), pair[1]), position)

    wrong = {"a wider window": gemma4.Twin(name, window=WINDOW + 1), "one position early": Late(name)}
    for what, twin in (wrong | {"hidden state first": Swapped(name), "other keys": Unturned(name)}).items():
        error = largest_error(rounds, twin)
        assert error > 1e-3, f"{name}, {what}: changes the logits by {error:.1e} only, so the twin would not tell"


@pytest.fixture
def theirs(monkeypatch):
    """name -> transformers' own assistant with the published tensors. 5.23 refuses to build one, for it asks that a layer of the
    same model makes the keys; so the question is answered for it here."""
    asked = Gemma4TextConfig.__dict__.get("kv_sharing_modes")
    if asked is not None:
        answer = lambda config: (  # noqa: E731
            ["reuse"] * config.num_hidden_layers
            if config.num_kv_shared_layers == config.num_hidden_layers
            else asked.fget(config)
        )
        monkeypatch.setattr(Gemma4TextConfig, "kv_sharing_modes", property(answer))

    def build(name):
        config = AutoConfig.for_model(**gemma4.config_of(name))
        model = AutoModelForCausalLM.from_config(config).eval()
        missing, surplus = model.load_state_dict(gemma4.published(name), strict=False)
        assert set(missing) <= {"lm_head.weight"}
        assert not surplus
        model.tie_weights()
        return model

    return build


@pytest.mark.parametrize("name", ["e2b", "moe"])
def test_transformers_own_assistant_computes_the_same(name, theirs, monkeypatch, loaded):
    """Fed by hand with the target's keys up to the position where ours stands; it applies no soft cap to the logits."""
    twin, model = gemma4.Twin(name), theirs(name)
    for text, found in recorded(loaded(name), monkeypatch, prompts((12,))[0], num_tokens=8):
        keys, hidden = twin.read(text)
        shared = {kind: (pair[0][None], pair[1][None]) for kind, pair in keys.items()}
        token = torch.tensor(text[-1])
        for logits in found:
            pair = torch.cat([twin.model.get_input_embeddings()(token), hidden])[None, None]
            with torch.no_grad():
                out = model(inputs_embeds=pair, position_ids=torch.tensor([[len(text) - 2]]), shared_kv_states=shared)
            cap, seen = twin.text.get("final_logit_softcapping"), logits.isfinite()
            wanted = out.logits[0, 0] if cap is None else cap * (out.logits[0, 0] / cap).tanh()
            error = float((wanted - logits)[seen].abs().max())
            assert error < 1e-4, f"{name} behind {len(text)} tokens: off by {error}"
            hidden, token = out.last_hidden_state[0, 0], logits.argmax()


def test_an_assistant_that_transformers_loaded(theirs, loaded, tmp_path):
    mine, row = loaded("e2b"), prompts()[0]
    decoder = MTPDecoder.from_model(mine.target, assistant=theirs("e2b"))
    for name, tensor in mine.assistant.state_dict().items():
        assert torch.equal(decoder.assistant.state_dict()[name], tensor), name
    assert decoder.generate(tiny.one(row), max_new_tokens=8, **GREEDY).tolist() == [row + plain("e2b", tuple(row))[:8]]


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@EVERY
def test_a_tiny_checkpoint(name, written, loaded):
    assert sum(path.stat().st_size for path in written(name).iterdir()) < 2e6, "2 MB at most"
    tensors = gemma4.published(name)
    assert loaded(name).assistant.state_dict().keys() == tensors.keys(), "our names are the published ones"
    for key, tensor in loaded(name).assistant.state_dict().items():
        assert torch.equal(tensor, tensors[key]), f"{key} is not the tensor that was written"


@EVERY
def test_target_and_assistant_from_folders(name, written, tmp_path):
    copy.deepcopy(gemma4.target(name)).save_pretrained(tmp_path / "target")
    row = prompts()[0]
    decoder = MTPDecoder.from_pretrained(tmp_path / "target", assistant=written(name), num_speculative_tokens=2)
    assert type(decoder.target) is type(gemma4.target(name))
    assert decoder.head is None
    found = decoder.generate(tiny.one(row), max_new_tokens=16, **GREEDY)
    assert found.tolist() == [row + plain(name, tuple(row))[:16]]
    assert decoder.metrics.tau > 1


def test_in_one_line(written, monkeypatch):
    model, row, folder = gemma4.target("e2b"), prompts()[0], written("e2b")
    expected = [row + plain("e2b", tuple(row))[:8]]
    assert mtpdecode.generate(model, tiny.one(row), assistant=folder, max_new_tokens=8, **GREEDY).tolist() == expected
    monkeypatch.setattr("mtpdecode.assistant.Checkpoint", None)  # a second call reads nothing
    assert mtpdecode.generate(model, tiny.one(row), assistant=folder, max_new_tokens=8, **GREEDY).tolist() == expected


def test_half_precision(written):
    model = copy.deepcopy(gemma4.target("e2b")).to(torch.bfloat16)
    decoder = MTPDecoder.from_model(model, assistant=written("e2b"))
    assert {parameter.dtype for parameter in decoder.assistant.parameters()} == {torch.bfloat16}
    assert decoder.generate(**tiny.padded(prompts()), max_new_tokens=4).shape == (4, 13)


def test_a_copy_of_the_output_layer_is_no_surplus(tmp_path):
    def with_copy(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    MTPDecoder.from_model(gemma4.target("e2b"), assistant=gemma4.write(tmp_path / "copied", "e2b", with_copy))


def test_what_the_generation_config_says(tmp_path, loaded):
    row = prompts()[0]
    usual = set(plain("e2b", tuple(row)))
    banned = sorted(usual)[: len(usual) // 2]
    folder = gemma4.write(tmp_path / "said", "e2b", generation={"num_assistant_tokens": 2, "suppress_tokens": banned})
    decoder = MTPDecoder.from_model(gemma4.target("e2b"), assistant=folder)
    assert decoder.options.schedule.start == 2
    scores = decoder.assistant.logits(torch.randn(64, 24, generator=torch.Generator().manual_seed(0)))
    assert bool(scores[:, banned].isinf().all()), "suppressed tokens are never drafted"
    assert bool(scores.isfinite().any(-1).all())
    found = decoder.generate(tiny.one(row), max_new_tokens=NUM_TOKENS, **GREEDY)
    assert found.tolist() == [row + plain("e2b", tuple(row))], "but the target says them"
    assert loaded("e2b").options.schedule.start == 3, "where nothing is said"


def broken(tensors, name):
    return tensors | {name: tensors[name] * float("nan")}


def quantised(tensors, name):
    return tensors | {name + "_scale_inv": torch.ones(1)}


CHANGES = [
    (removed, "missing: "),
    (renamed, "surplus: "),
    (reshaped, "misshapen: "),
    (broken, "with NaN or infinite values: "),
    (quantised, "quantised: "),
]


@pytest.mark.parametrize("part", ["pre_projection", "model.layers.1.self_attn.q_proj", "masked_embedding.centroids"])
@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_a_wrong_tensor_is_named(change, says, part, tmp_path):
    folder = gemma4.write(tmp_path / "wrong", "e2b", lambda tensors: change(tensors, part + ".weight"))
    refused(HeadWeightsError, lambda: MTPDecoder.from_model(gemma4.target("e2b"), assistant=folder), says, part + ".weight")


def test_an_ordering_that_lacks_tokens(tmp_path):
    def doubled(tensors):
        return tensors | {"masked_embedding.token_ordering": tensors["masked_embedding.token_ordering"].clamp(min=1)}

    folder = gemma4.write(tmp_path / "wrong", "e2b", doubled)
    refused(HeadWeightsError, lambda: MTPDecoder.from_model(gemma4.target("e2b"), assistant=folder), "token_ordering")


def test_centroids_that_do_not_divide_the_vocabulary(tmp_path):
    folder = gemma4.write(tmp_path / "wrong", "e2b", num_centroids=13)
    refused(HeadWeightsError, lambda: MTPDecoder.from_model(gemma4.target("e2b"), assistant=folder), "13 centroids", "48 tokens")


@pytest.mark.parametrize(
    ("target", "assistant", "says"),
    [
        ({}, {"backbone_hidden_size": 64}, ["hidden states of size: 64, where the target has 32"]),
        ({"vocab_size": 60}, {}, ["tokens: 48, where the target has 60"]),
        ({"global_head_dim": 32}, {}, ["numbers per key in full_attention layers: 16, where the target has 32"]),
        ({"num_key_value_heads": 4}, {}, ["key heads in sliding_attention layers: 2, where the target has 4"]),
        ({"layer_types": ["full_attention"] * 5}, {}, ["sliding_attention layers: 1, where the target has 0"]),
    ],
)
def test_the_assistant_of_another_target(target, assistant, says, tmp_path):
    model = gemma4.build("e2b", **target)
    folder = gemma4.write(tmp_path / "other", "e2b", **assistant)
    refused(HeadWeightsError, lambda: MTPDecoder.from_model(model, assistant=folder), *says, "published with this model")


def test_an_assistant_in_memory_goes_with_one_size_only(loaded):
    wider = gemma4.build("e2b", hidden_size=64)
    refused(HeadWeightsError, lambda: MTPDecoder.from_model(wider, assistant=loaded("e2b").assistant), "size: 32", "has 64")


def test_what_is_no_assistant(tmp_path):
    model, other = gemma4.target("e2b"), tiny.target("llama")
    folder = tiny.write_checkpoint(tmp_path / "llama", other)
    for source in (folder, other):
        call = lambda source=source: MTPDecoder.from_model(model, assistant=source)  # noqa: E731
        refused(UnsupportedModelError, call, "model_type is 'llama'", "gemma4_assistant", "generate(assistant_model=...)")
    call = lambda: MTPDecoder.from_model(model, assistant=3)  # noqa: E731
    refused(UnsupportedModelError, call, "assistant=int", "google/gemma-4-E2B-it-assistant")


def test_gemma_without_its_assistant(written):
    for name in NAMES:
        call = lambda name=name: MTPDecoder.from_model(gemma4.target(name))  # noqa: E731
        refused(UnsupportedModelError, call, "assistant='google/gemma-4-E2B-it-assistant'", "NGramProposer()")
    call = lambda: MTPDecoder.from_model(gemma4.target("e2b"), head=written("e2b"))  # noqa: E731
    refused(UnsupportedModelError, call, "assistant=")
    refused(UnsupportedModelError, lambda: mtpdecode.generate(gemma4.target("e2b"), tiny.one([5, 6])), "assistant=")


def test_an_assistant_for_a_target_with_a_head_of_its_own(written):
    call = lambda: MTPDecoder.from_model(tiny.target("llama"), assistant=written("e2b"))  # noqa: E731
    refused(UnsupportedModelError, call, "LlamaForCausalLM drafts with a head of its own")


def test_an_assistant_and_something_else_that_drafts(loaded):
    decoder = loaded("e2b")
    call = lambda: MTPDecoder.from_model(decoder.target, assistant=decoder.assistant, proposer=NGramProposer())  # noqa: E731
    refused(GenerationError, call, "proposer= besides")


def test_a_cache_that_does_not_show_its_keys(loaded):
    class Hidden(RaggedCache):
        kept = KVCacheManager.kept

    decoder = MTPDecoder.from_model(gemma4.target("e2b"), assistant=loaded("e2b").assistant, cache=Hidden)
    refused(CacheError, lambda: decoder.generate(tiny.one([5, 6, 7]), max_new_tokens=4), "Hidden", "kept(layer)")


def test_tokens_that_see_those_behind_them_are_refused():
    model = gemma4.build("e2b", use_bidirectional_attention="all")
    call = lambda: MTPDecoder.from_model(model, proposer=NGramProposer())  # noqa: E731
    refused(UnsupportedModelError, call, "use_bidirectional_attention='all'")


def test_the_table_says_so():
    row = next(row for row in families() if row["family"] == "gemma4")
    assert (row["kv"], row["positions"], row["recycle"]) == ("target", "frozen", "projected")
    assert row["assistants"] == ["gemma4_assistant", "gemma4_unified_assistant"]


# ── prompts with images ─────────────────────────────────────────────────────────────────────────────────────────────────────

PICTURE = [IMAGE] * NUM_SOFT_TOKENS
ROWS = [[8, 9, 10, *PICTURE, 11, 12, 13], [20, 21, *PICTURE, 22, *PICTURE, 23, 24], [30, 31, 32, 33], [*PICTURE, *PICTURE, 40]]
PICTURES = [1, 2, 0, 2]


def pictures(name):
    """The prompt's images, row by row, and all of them together."""
    whole = gemma4.images(name, sum(PICTURES))
    parts = {key: tensor.split(PICTURES) for key, tensor in whole.items()}
    return [{key: tensors[row] for key, tensors in parts.items()} if PICTURES[row] else {} for row in range(len(ROWS))], whole


def types(ids):
    """What a processor says of every token: 1 for an image's."""
    return {"mm_token_type_ids": (ids == IMAGE).long()}


@cache
def plain_with_images(name, row, say_types=True):
    ids, options = tiny.one(ROWS[row]), GREEDY | {"max_new_tokens": 40}
    said = types(ids) if say_types else {}
    whole = gemma4.target(name).generate(ids, attention_mask=torch.ones_like(ids), **pictures(name)[0][row], **said, **options)
    return whole[0, len(ROWS[row]) :].tolist()


@WITH_IMAGES
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_speculative_tokens", [1, 3])
def test_prompts_with_images_decode_as_in_generate(name, side, num_speculative_tokens, loaded):
    batch, expected = tiny.padded(ROWS, side), [plain_with_images(name, row) for row in range(len(ROWS))]
    options = GREEDY | {"max_new_tokens": 40, "num_speculative_tokens": num_speculative_tokens}
    decoder = loaded(name)
    found = decoder.generate(**batch, **pictures(name)[1], **types(batch["input_ids"]), prefill_chunk_size=4, **options)
    tiny.assert_rows(found, batch["input_ids"].shape[1], expected, f"{name}, padded on the {side}")
    assert decoder.metrics.acceptance_rate()[0] > 0.1, f"{decoder.metrics}"


@WITH_IMAGES
def test_each_row_alone_on_the_other_cache(name, loaded):
    decoder = MTPDecoder.from_model(gemma4.target(name), assistant=loaded(name).assistant, cache=CropCache)
    for row, given in enumerate(pictures(name)[0]):
        ids = tiny.one(ROWS[row])
        found = decoder.generate(ids, **given, **types(ids), max_new_tokens=40, **GREEDY)
        assert found.tolist() == [ROWS[row] + plain_with_images(name, row)], f"{name} on CropCache, row {row}"


@WITH_IMAGES
def test_the_pictures_matter(name):
    """And in the larger models, whether an image's tokens see each other."""
    model, others, changed = gemma4.target(name), gemma4.images(name, 2, seed=1), []
    for row in (1, 3):
        ids = tiny.one(ROWS[row])
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **others, **types(ids), max_new_tokens=40, **GREEDY)
        changed.append(text[0, len(ROWS[row]) :].tolist() != plain_with_images(name, row))
    assert any(changed), "other pictures give the same text"
    same = [plain_with_images(name, row) == plain_with_images(name, row, say_types=False) for row in (1, 3)]
    assert all(same) == (name == "e2b_images"), f"{name}: without token types the same text: {same}"


@WITH_IMAGES
def test_images_without_token_types(name, loaded):
    ids = tiny.one(ROWS[1])
    found = loaded(name).generate(ids, **pictures(name)[0][1], max_new_tokens=40, **GREEDY)
    assert found.tolist() == [ROWS[1] + plain_with_images(name, 1, say_types=False)]


@WITH_IMAGES
def test_eager_attention_over_images(name, written):
    model, ids = copy.deepcopy(gemma4.target(name)), tiny.one(ROWS[1])
    model.set_attn_implementation("eager")
    decoder = MTPDecoder.from_model(model, assistant=written(name))
    found = decoder.generate(ids, **pictures(name)[0][1], **types(ids), max_new_tokens=40, **GREEDY)
    assert found.tolist() == [ROWS[1] + plain_with_images(name, 1)]


@pytest.mark.parametrize("name", ["moe", "unified"])
def test_images_larger_than_the_window(name, loaded):
    """Whether an image's last token sees its first is where the two models differ."""
    model, ids, given = gemma4.build(name, sliding_window=4), tiny.one(ROWS[1]), pictures(name)[0][1]
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **given, **types(ids), max_new_tokens=40, **GREEDY)
    decoder = MTPDecoder.from_model(model, proposer=NGramProposer(), num_speculative_tokens=2)
    found = decoder.generate(ids, **given, **types(ids), max_new_tokens=40, **GREEDY)
    assert found.tolist() == expected.tolist()


@WITH_IMAGES
def test_the_target_makes_of_images_what_it_makes_in_one_forward_pass(name, loaded, monkeypatch):
    """Hidden states of the whole prompt, to 1e-5: greedy text alone would forgive a small difference in a mask."""
    decoder, ids, given, read = loaded(name), tiny.one(ROWS[1]), pictures(name)[0][1], []
    real = mtpdecode.verifier.forward
    monkeypatch.setattr(mtpdecode.verifier, "forward", lambda *args: read.append(real(*args)) or read[-1])
    decoder.generate(ids, **given, **types(ids), max_new_tokens=1, **GREEDY)
    kept = []
    hook = decoder.target.get_decoder().norm.register_forward_hook(lambda _, inputs, output: kept.append(output))
    with torch.no_grad():
        decoder.target(ids, **given, **types(ids))
    hook.remove()
    error = (read[0].hidden - kept[0][:, :-1]).abs().amax(-1)[0]
    assert float(error.max()) < 1e-5, f"{name}: off by {error.tolist()}"


@WITH_IMAGES
def test_the_assistant_reads_keys_of_images(name, loaded, monkeypatch):
    given = pictures(name)[0][1]
    rounds = recorded(loaded(name), monkeypatch, ROWS[1], **given)  # without token types, with which a prompt may be cut anywhere
    assert largest_error(rounds, gemma4.Twin(name), **given) < 1e-4


@WITH_IMAGES
def test_through_transformers_own_seam(name, loaded):
    ids, given = tiny.one(ROWS[1]), pictures(name)[0][1]
    found = gemma4.target(name).generate(ids, **given, **types(ids), max_new_tokens=40, custom_generate=loaded(name), **GREEDY)
    assert found.tolist() == [ROWS[1] + plain_with_images(name, 1)]


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_videos_and_sounds(kind):
    model, tokens = gemma4.build_hearing(), {"video": tiny.EOS, "audio": gemma4.SOUND}
    rows = [[8, 9, *9 * [tokens[kind]], 10, *9 * [tokens[kind]], 11], [20, *9 * [tokens[kind]], 21, *9 * [tokens[kind]], 22, 23]]
    batch = tiny.padded(rows, "right")
    given = gemma4.videos() if kind == "video" else gemma4.sounds(4, 36)
    said = {"mm_token_type_ids": (batch["input_ids"] == tokens[kind]) * {"video": 2, "audio": 3}[kind]}
    decoder = MTPDecoder.from_model(model, proposer=NGramProposer(), num_speculative_tokens=2)
    found = decoder.generate(**batch, **given, **said, max_new_tokens=24, **GREEDY)
    left = tiny.padded(rows)
    said = {"mm_token_type_ids": (left["input_ids"] == tokens[kind]) * {"video": 2, "audio": 3}[kind]}
    expected = model.generate(**left, **given, **said, max_new_tokens=24, **GREEDY)
    assert found[:, left["input_ids"].shape[1] :].tolist() == expected[:, left["input_ids"].shape[1] :].tolist()
    assert expected.tolist() != model.generate(**left, max_new_tokens=24, **GREEDY).tolist(), f"the {kind} must matter"


def test_text_of_a_processor_on_a_model_for_images(loaded):
    """Token types that say of all tokens that they are text are those of a text; also where images are not read."""
    row = prompts()[0]
    found = loaded("moe").generate(tiny.one(row), mm_token_type_ids=torch.zeros(1, 9).long(), max_new_tokens=8, **GREEDY)
    assert found.tolist() == [row + plain("moe", tuple(row))[:8]]
    found = tiny.decoder("llama").generate(tiny.one(row), mm_token_type_ids=torch.zeros(1, 9).long(), max_new_tokens=8, **GREEDY)
    assert found.tolist() == [row + tiny.plain("llama", row, max_new_tokens=8)]


def test_a_prompt_that_ends_in_an_image(loaded):
    ids = tiny.one([8, 9, *PICTURE])
    call = lambda **said: loaded("moe").generate(ids, **gemma4.images("moe", 1), max_new_tokens=4, **said)  # noqa: E731
    refused(GenerationError, call, "Row 0", "ends in an image")
    refused(GenerationError, lambda: call(**types(ids)), "Row 0", "ends in an image")


def test_images_for_a_model_without_eyes(loaded):
    call = lambda: loaded("e2b").generate(tiny.one(ROWS[0]), **gemma4.images("moe", 1))  # noqa: E731
    refused(GenerationError, call, "pixel_values")


def test_images_for_another_family(loaded):
    """Nobody has shown that Step's are read exactly: refused by name, where text alone decodes."""
    model = next(case for case in cases() if case.family == "step3p7").build()
    decoder = MTPDecoder.from_model(model, proposer=NGramProposer())
    for given in ({"pixel_values": torch.rand(4, 12)}, {"pixel_values_local": torch.rand(4, 12)}):
        call = lambda given=given: decoder.generate(tiny.one([5, 6, 7]), **given, max_new_tokens=4)  # noqa: E731
        refused(GenerationError, call, type(model).__name__, next(iter(given)), "not known to be exact")


# ── prompts as embeddings, in a model with embeddings for each layer ────────────────────────────────────────────────────────


def test_embeddings_of_tokens(loaded):
    """The tokens are found again by their embeddings, as the model itself does it; padding may hold anything."""
    model, rows = gemma4.target("e2b"), prompts()
    batch = tiny.padded(rows)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    embeds[~batch["attention_mask"].bool()] = 0.5
    options = GREEDY | {"max_new_tokens": 24, "num_speculative_tokens": 3}
    found = loaded("e2b").generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **options)
    tiny.assert_rows(found, 0, [plain("e2b", tuple(row))[:24] for row in rows], "prompts as embeddings")


def test_embeddings_of_no_token(loaded):
    model, row = gemma4.target("e2b"), prompts()[0]
    embeds = model.get_input_embeddings()(tiny.one(row)).detach()
    layers = model.get_decoder().get_per_layer_inputs(tiny.one(row), None).detach()
    moved = embeds + 0.6 * torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0))
    refused(
        GenerationError, lambda: loaded("e2b").generate(inputs_embeds=moved, max_new_tokens=4), "no token's", "per_layer_inputs="
    )
    expected = written_slowly(model, moved, layers, 24)
    assert expected != plain("e2b", tuple(row))[:24], "the noise must matter"
    found = loaded("e2b").generate(inputs_embeds=moved, per_layer_inputs=layers, max_new_tokens=24, **GREEDY)
    assert found.tolist() == [expected]


@torch.no_grad()
def written_slowly(model, embeds, layers, num_tokens):
    """Greedy text behind embeddings, without a cache: transformers' own loop hands per_layer_inputs on with tokens, and fails."""
    tokens = []
    for _ in range(num_tokens):
        logits = model(inputs_embeds=embeds, per_layer_inputs=layers, use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
        ids = tiny.one(tokens[-1:])
        embeds = torch.cat([embeds, model.get_input_embeddings()(ids)], dim=1)
        layers = torch.cat([layers, model.get_decoder().get_per_layer_inputs(ids, None)], dim=1)
    return tokens
