"""Bad input is a clear error of our tree, before anything has begun.

Every message says what was asked, what was found and what to type instead; the tables below hold these three parts.
"""

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation import logits_process
from transformers.generation.streamers import BaseStreamer

from mtpdecode import (
    CacheError,
    CropCache,
    GenerationError,
    HeadWeightsError,
    MTPDecodeError,
    MTPDecoder,
    MTPHead,
    MTPSpec,
    NGramProposer,
    UnsupportedModelError,
    generate,
)
from mtpdecode.families import FAMILIES
from mtpdecode.request import NOT_OURS
from tests import tiny

IDS = tiny.one([5, 6, 7, 8])


def says(error, call, asked, found, remedy):
    """The call raises the error; its message has the three parts, in this order or another."""
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, MTPDecodeError)
    message = str(caught.value)
    for what, part in (("was asked", asked), ("was found", found), ("to type instead", remedy)):
        assert part in message, f"what {what} ({part!r}) is not in the message: {message}"
    assert message.rstrip()[-1] in ".?", f"not a sentence: {message}"
    return message


@pytest.fixture
def untouched():
    """A decoder whose target must not run: an error comes before the first forward."""
    decoder, forwards = tiny.decoder("llama", 2), []
    hook = decoder.target.register_forward_hook(lambda *_: forwards.append(1))
    yield decoder
    hook.remove()
    assert not forwards, f"the target ran {len(forwards)} times before the error"


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def assert_families_are_named(message):
    """All of them, in order."""
    named = message.partition("Known families: ")[2].partition(". ")[0].split(", ")
    assert named == sorted(model_type for row in FAMILIES for model_type in row.model_types)


def test_a_model_without_a_known_family():
    model = tiny.target("mistral")
    parts = "MistralForCausalLM", "model_type='mistral'", "NGramProposer()"
    message = says(UnsupportedModelError, lambda: MTPDecoder.from_model(model), *parts)
    assert_families_are_named(message)
    assert "spec=MTPSpec(...)" in message
    with pytest.raises(UnsupportedModelError, match="NGramProposer"):
        generate(model, IDS)


def test_a_model_in_memory_without_a_head():
    says(
        UnsupportedModelError,
        lambda: MTPDecoder.from_model(tiny.target("llama")),
        "The head of LlamaForCausalLM",
        "built in memory and names no checkpoint",
        "proposer=NGramProposer()",
    )


def test_a_model_whose_checkpoint_has_no_head(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "bare", tiny.target("llama"))
    message = says(
        UnsupportedModelError,
        lambda: MTPDecoder.from_pretrained(folder),
        str(folder),
        "LlamaForCausalLM has no native MTP head",
        "proposer=NGramProposer()",
    )
    assert_families_are_named(message)
    decoder = MTPDecoder.from_pretrained(folder, proposer=NGramProposer(), num_speculative_tokens=2)
    assert decoder.generate(IDS, max_new_tokens=2).shape == (1, 6), "and what it says to type works"


@pytest.mark.parametrize("proposer", [None, NGramProposer()])
def test_an_encoder_decoder_model(proposer):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    says(
        UnsupportedModelError,
        lambda: MTPDecoder.from_model(model, proposer=proposer),
        "T5ForConditionalGeneration",
        "is an encoder-decoder model",
        "Call model.generate()",
    )
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        MTPHead(model, tiny.row_of("llama"))


def test_a_recurrent_layer_that_nobody_has_shown_to_be_exact():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 20}
    layers = {"intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"], "pad_token_id": 0}
    model = OlmoHybridForCausalLM(OlmoHybridConfig(**sizes, **layers))
    says(
        UnsupportedModelError,
        lambda: MTPDecoder.from_model(model, proposer=NGramProposer()),
        "OlmoHybridForCausalLM",
        "linear_attention layers are recurrent and made of OlmoHybridGatedDeltaNet, OlmoHybridMLP, OlmoHybridRMSNorm, none of",
        "Call model.generate()",
    )


def test_another_layer_type():
    model = tiny.build("sliding")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    model.config.attention_chunk_size = 8
    says(
        UnsupportedModelError,
        lambda: MTPDecoder.from_model(model, proposer=NGramProposer()),
        "Qwen2ForCausalLM",
        "chunked_attention",
        "Call model.generate()",
    )


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_an_attention_that_takes_no_mask(implementation):
    model = tiny.build("llama")
    head = tiny.build_head(model, tiny.row_of("llama"))
    model.config._attn_implementation_internal = implementation
    says(
        UnsupportedModelError,
        lambda: MTPDecoder.from_model(model, head=head),
        "LlamaForCausalLM",
        f"attn_implementation={implementation!r}",
        'attn_implementation="sdpa"',
    )


@pytest.mark.parametrize("thing", ["a/folder", None, 3, torch.nn.Linear(2, 2)])
def test_something_that_is_no_model(thing):
    found = type(thing).__name__
    says(UnsupportedModelError, lambda: MTPDecoder.from_model(thing), "was to be decoded", found, "MTPDecoder.from_pretrained")


@pytest.mark.parametrize(
    ("changes", "asked"), [({"hidden_size": 64}, "hidden states of size 32"), ({"vocab_size": 64}, "a vocabulary of 48")]
)
def test_a_head_of_another_size(changes, asked):
    model, head = tiny.build("llama", **changes), tiny.head("llama")
    parts = asked, "LlamaForCausalLM has 64", "MTPHead(model, spec)"
    says(HeadWeightsError, lambda: MTPDecoder.from_model(model, head=head), *parts)


# ── options of a decoder ────────────────────────────────────────────────────────────────────────────────────────────────────

BAD_OPTIONS = {
    "num_speculative_tokens": [-1, 1.0, True, "2", [2]],
    "acceptance": ["strict", "", 3, ["standard"]],
    "draft_sampling": ["argmax", "", 1],
}
REMEDY = {
    "num_speculative_tokens": ("must be an int of at least 0", "1: a good start"),
    "acceptance": ("known rules are 'standard', 'block', 'coupled'", "Pass one of them, or an Acceptance"),
    "draft_sampling": ("was asked for", "'sample' or 'greedy'"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_OPTIONS.items() for value in values])
def test_options(name, value, untouched):
    given = {name: value}
    found, remedy = REMEDY[name]
    asked = f"{name}={value!r}"
    head = tiny.head("llama")
    says(GenerationError, lambda: MTPDecoder.from_model(tiny.target("llama"), head=head, **given), asked, found, remedy)
    says(GenerationError, lambda: untouched.generate(IDS, max_new_tokens=2, **given), asked, found, remedy)
    says(GenerationError, lambda: untouched.stream(IDS, max_new_tokens=2, **given), asked, found, remedy)
    model = untouched.target
    says(GenerationError, lambda: model.generate(IDS, max_new_tokens=2, **given, custom_generate=untouched), asked, found, remedy)


def test_a_proposer_of_no_use():
    says(GenerationError, lambda: NGramProposer(max_ngram=0), "max_ngram=0", "was asked for", "must be at least 1")


def test_saving_without_a_head(tmp_path):
    decoder = MTPDecoder.from_model(tiny.target("llama"), proposer=NGramProposer())
    says(GenerationError, lambda: decoder.save_pretrained(tmp_path), "save_pretrained()", "has no head", "Save the target itself")
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_the_wrong_cache_for_a_batch(untouched):
    decoder = tiny.decoder("llama", 2, cache=CropCache)
    batch = tiny.padded(tiny.prompts())
    parts = "CropCache was asked to hold 5 rows", "holds 1", "RaggedCache"
    says(CacheError, lambda: decoder.generate(**batch, max_new_tokens=2), *parts)


# ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

ONES = torch.ones(2, 4, dtype=torch.long)
HOLE = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])
HIDDEN = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
HOLES = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1]])

BAD_PROMPTS = {
    "none": ({}, "generate() was called", "without a prompt", "Pass input_ids"),
    "no rows": ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, "prompt is empty", "(0, 3)", "at least one row"),
    "no tokens": ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "prompt is empty", "(2, 0)", "at least one token"),
    "no embeddings": ({"inputs_embeds": torch.zeros(1, 0, 32)}, "prompt is empty", "(1, 0, 32)", "at least one token"),
    "a list": ({"input_ids": [[5, 6]]}, "input_ids must be a tensor", "found list", "return_tensors='pt'"),
    "a string": ({"input_ids": "The future of"}, "input_ids must be a tensor", "found str", "tokenizer("),
    "one axis": ({"input_ids": torch.tensor([5, 6])}, "2 axes", "(2,)", "input_ids[None]"),
    "three axes": ({"input_ids": torch.ones(1, 2, 3).long()}, "2 axes", "(1, 2, 3)", "tokenizer("),
    "embeddings of one row": ({"inputs_embeds": torch.ones(2, 32)}, "3 axes", "(2, 32)", "inputs_embeds[None]"),
    "floats": ({"input_ids": ONES.float()}, "input_ids must hold integers", "torch.float32", "Pass token ids"),
    "booleans": ({"input_ids": ONES.bool()}, "input_ids must hold integers", "torch.bool", "Pass token ids"),
    "too large": ({"input_ids": ONES * 48}, "0..47", "found 48", "the model's own tokenizer"),
    "negative": ({"input_ids": torch.tensor([[5, -100]])}, "0..47", "found -100", "the model's own tokenizer"),
    "another mask": ({"input_ids": ONES, "attention_mask": ONES[:, :3]}, "shape (2, 4)", "(2, 3)", "Pass the mask"),
    "a row's mask": ({"input_ids": ONES, "attention_mask": ONES[0]}, "2 axes", "(4,)", "attention_mask[None]"),
    "a 4D mask": ({"input_ids": ONES, "attention_mask": ONES[None, None]}, "2 axes", "(1, 1, 2, 4)", "tokenizer("),
    "a hidden row": ({"input_ids": ONES, "attention_mask": HIDDEN}, "row 1", "hides", "Leave that row out"),
    "a hole": ({"input_ids": ONES, "attention_mask": HOLE}, "attention_mask", "has a hole", "padding on the left or the right"),
    "two holes": ({"input_ids": ONES, "attention_mask": HOLES}, "attention_mask", "has a hole", "must stand together"),
    "too long": ({"input_ids": torch.full((1, 256), 5)}, "256 tokens", "256 positions", "Shorten the prompt"),
    "far too long": ({"input_ids": torch.full((1, 300), 5)}, "300 tokens", "256 positions", "Shorten the prompt"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_prompts(case, untouched):
    given, *parts = BAD_PROMPTS[case]
    says(GenerationError, lambda: untouched.generate(**given, max_new_tokens=2), *parts)
    says(GenerationError, lambda: untouched.stream(**given, max_new_tokens=2), *parts)


def test_padding_does_not_make_a_prompt_too_long():
    ids, mask = torch.full((1, 300), 5), torch.zeros(1, 300, dtype=torch.long)
    mask[:, 290:] = 1
    assert tiny.decoder("llama", 2).generate(ids, attention_mask=mask, max_new_tokens=2).shape == (1, 302)


def test_a_prompt_given_twice(untouched):
    parts = "input_ids=", "given a prompt twice", "Pass one of them"
    says(GenerationError, lambda: untouched.generate(IDS, input_ids=IDS), *parts)


# ── keywords ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_tokens", "max_new_tokens"),
        ("max_new_token", "max_new_tokens"),
        ("num_speculative_token", "num_speculative_tokens"),
        ("temprature", "temperature"),
        ("attention_masks", "attention_mask"),
        ("sed", "seed"),
        ("draft_sample", "draft_sampling"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(name, nearest, untouched):
    says(GenerationError, lambda: untouched.generate(IDS, **{name: 3}), name, "unknown keyword", f"Did you mean {nearest!r}?")


def test_a_keyword_like_no_other(untouched):
    says(GenerationError, lambda: untouched.generate(IDS, xyzzy=3), "xyzzy", "unknown keyword", "what model.generate takes")


ASKED = {
    "num_beams": 4,
    "num_beam_groups": 2,
    "constraints": [object()],
    "force_words_ids": [[5]],
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "guidance_scale": 1.5,
    "negative_prompt_ids": IDS,
    "negative_prompt_attention_mask": torch.ones_like(IDS),
    "custom_generate": "somebody/elses-loop",
    "token_healing": True,
    "assistant_model": "another model",
    "prompt_lookup_num_tokens": 3,
    "use_mtp": True,
    "assistant_early_exit": 1,
    "cache": object(),
    "past_key_values": object(),
    "cache_implementation": "static",
    "use_cache": False,
    "position_ids": torch.arange(4)[None],
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "synced_gpus": True,
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_modes_that_are_not_ours(name, untouched):
    value = ASKED.get(name, object())
    says(
        GenerationError,
        lambda: untouched.generate(IDS, max_new_tokens=2, **{name: value}),
        f"{name}=",
        NOT_OURS[name][1],
        "Leave it out, or call model.generate() without mtpdecode",
    )


@pytest.mark.parametrize("name", NOT_OURS)
def test_and_neither_are_their_neutral_values_an_error(name):
    if name in {"cache", "past_key_values"} - {tiny.CACHE}:
        pytest.skip("transformers itself minds the name that it does not use")
    off, _ = NOT_OURS[name]
    for value in off:
        if (name, value) == ("num_beams", None):
            continue  # transformers itself wants a number
        assert tiny.decoder("llama", 1).generate(IDS, max_new_tokens=1, **{name: value}).shape == (1, 5), f"{name}={value}"


@pytest.mark.parametrize("name", ["num_beams", "penalty_alpha", "output_scores", "dola_layers"])
def test_modes_in_the_generation_config(name, untouched):
    """A configuration that asks for beams is not decoded greedily in silence."""
    config = GenerationConfig(max_new_tokens=2, return_dict_in_generate=True, **{name: ASKED[name]})
    with pytest.raises(ValueError, match=f"{name}"):
        untouched.generate(IDS, generation_config=config)


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.values = []

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.values.append(None)


def test_a_streamer_for_several_rows(untouched):
    streamer, batch = Recorder(), tiny.padded(tiny.prompts()) | {"max_new_tokens": 2}
    says(GenerationError, lambda: untouched.generate(**batch, streamer=streamer), "streamer=", "5 rows", "decoder.stream(...)")
    assert not streamer.values, "and it was told nothing"
    says(
        GenerationError,
        lambda: untouched.generate(IDS, streamer=streamer, num_return_sequences=2, do_sample=True, max_new_tokens=2),
        "streamer=",
        "2 rows",
        "decoder.stream(...)",
    )


def test_seeds_of_the_wrong_number(untouched):
    batch = {**tiny.padded(tiny.prompts()), "max_new_tokens": 2, "do_sample": True}
    says(GenerationError, lambda: untouched.generate(**batch, seed=[1, 2]), "seed holds 2", "5 rows", "one per row")
    more = {"num_return_sequences": 2, "seed": [1, 2, 3, 4, 5]}
    says(GenerationError, lambda: untouched.generate(**batch, **more), "seed holds 5", "10 rows", "one per row")


class Watermark(logits_process.SynthIDTextWatermarkLogitsProcessor):
    """Any processor that keeps a state of its own."""

    def __init__(self):
        pass


def test_a_processor_that_keeps_a_state(untouched):
    processors = LogitsProcessorList([Watermark()])
    says(
        GenerationError,
        lambda: untouched.generate(IDS, max_new_tokens=2, logits_processor=processors),
        "Watermark was asked for",
        "keeps a state between calls",
        "Leave its option out",
    )


def test_encoder_penalties(untouched):
    """They look at the whole batch's prompt, padding and all."""
    for name, value in (("encoder_repetition_penalty", 1.5), ("encoder_no_repeat_ngram_size", 2)):
        with pytest.raises(GenerationError, match=r"Encoder.*was asked for"):
            untouched.generate(IDS, max_new_tokens=2, **{name: value})


class Honest(LogitsProcessor):
    """A user's own processor, which is none of the refused ones."""

    def __call__(self, input_ids, scores):
        return scores


def test_a_users_own_processor_is_welcome():
    processors = LogitsProcessorList([Honest()])
    assert tiny.decoder("llama", 2).generate(IDS, max_new_tokens=2, logits_processor=processors).shape == (1, 6)


# ── after an error ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_decoder_is_none_the_worse_for_it():
    decoder, row = tiny.decoder("llama", 2), tiny.prompts()[0]
    expected = tiny.plain("llama", row, max_new_tokens=6)
    for given in ({"num_beams": 3}, {"seed": [1, 2], "do_sample": True}, {"acceptance": "strict"}, {"attention_mask": ONES}):
        with pytest.raises(GenerationError):
            decoder.generate(tiny.one(row), max_new_tokens=6, **given)
        assert decoder.generate(tiny.one(row), max_new_tokens=6, do_sample=False).tolist() == [row + expected], f"after {given}"


def test_a_spec_that_fits_no_tensor_is_said_by_name(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "llama", tiny.target("llama"), tiny.head("llama"))
    spec = MTPSpec("mine", ("llama",), "mtp.{i}.", tiny.row_of("llama").names)
    says(
        HeadWeightsError,
        lambda: MTPDecoder.from_pretrained(folder, spec=spec),
        "The mine head",
        "the files hold none of its tensors (mtp.0.*)",
        "head='ORIGINAL/REPOSITORY'",
    )
