"""Texts end where plain decoding ends them, and then both caches hold exactly that text."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

from mtpdecode import CropCache, GenerationError, RaggedCache
from tests import tiny

LENGTH = 24


class Kept:
    """A cache factory that remembers what it made: first the target's manager, then the head's."""

    def __init__(self, make=RaggedCache):
        self.make, self.made = make, []

    def __call__(self, *args):
        self.made.append(self.make(*args))
        return self.made[-1]


def assert_caches_hold(kept, decoder, rows, texts, num_layers):
    """The target's cache: all but the last token. The head's: what the round before had absorbed for good.

    text  a b c d e f     last round d e f     target  a b c d e     head (one layer)  a b     (two)  a
    """
    target, head = (cache.lengths.tolist() for cache in kept.made)
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        length = len(row) + len(text)
        assert target[number] == length - 1, f"row {number}: {length} tokens of text, {target[number]} in the target's cache"
        most = max(length - num_layers, 0)
        least = max(most - decoder.metrics.history[number][-1], 0)  # that of a row which ended in the last round of all
        assert least <= head[number] <= most, f"row {number}: {head[number]} in the head's cache, not {least} to {most}"


def check(name, rows, num_layers=1, k=3, make=RaggedCache, differ=True, **options):
    """Decode the rows as a batch with the options; compare with plain decoding of each alone; look into the caches."""
    kept = Kept(make)
    decoder = tiny.decoder(name, k, num_layers, cache=kept)
    given = (
        tiny.plain if "stopping_criteria" not in options else lambda _, row, **kwargs: tiny.alone(decoder.target, row, **kwargs)
    )
    expected = [given(name, row, **options) for row in rows]
    sequences = decoder.generate(**tiny.padded(rows), do_sample=False, **options)
    tiny.assert_rows(sequences, max(map(len, rows)), expected, f"{name}, {options}")
    assert_caches_hold(kept, decoder, rows, expected, num_layers)
    if differ and len(rows) > 1:
        assert len({len(text) for text in expected}) > 1, f"{options}: all rows end at the same place, a test of little"
    return expected


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_rows_end_at_their_own_end_token(name, num_layers):
    rows = tiny.prompts()
    free = [tiny.plain(name, row, max_new_tokens=LENGTH) for row in rows]
    ends = [free[0][3], free[1][0], free[2][9]]  # the first row may end in the middle of a round, the second at its first token
    texts = check(name, rows, num_layers, max_new_tokens=LENGTH, eos_token_id=ends)
    assert min(map(len, texts)) == 1, "a row of one new token must be among them"
    if num_layers == 2:
        check(name, rows, num_layers, max_new_tokens=LENGTH, eos_token_id=ends[0], differ=False)


@pytest.mark.parametrize("position", range(8))
@pytest.mark.parametrize("make", [RaggedCache, CropCache])
def test_an_end_token_at_every_place_of_a_round(position, make):
    row = tiny.prompts()[0]
    end = tiny.plain("llama", row, max_new_tokens=LENGTH)[position]
    texts = check("llama", [row], k=5, make=make, max_new_tokens=LENGTH, eos_token_id=end)
    assert texts[0][-1] == end, "the end token belongs to the text"


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9])
def test_the_length_is_never_overshot(length, num_layers):
    rows = tiny.prompts()
    check("llama", rows, num_layers, k=5, max_new_tokens=length, differ=False)
    decoder = tiny.decoder("llama", 5, num_layers)
    sequences = decoder.generate(**tiny.padded(rows), do_sample=False, max_length=9 + length)
    assert sequences.shape == (5, 9 + length), f"max_length={9 + length} counts the padded prompt, as in transformers"


def test_a_call_is_limited_by_default_like_the_models_own():
    decoder, row = tiny.decoder("llama", 3), tiny.prompts()[0]
    with pytest.warns(UserWarning, match="max_new_tokens"):
        expected = decoder.target.generate(tiny.one(row), do_sample=False)
    with pytest.warns(UserWarning, match="max_new_tokens"):
        sequences = decoder.generate(tiny.one(row), do_sample=False)
    assert torch.equal(sequences, expected), "without max_new_tokens: another length"


def test_time_is_up_after_the_token_that_plain_decoding_ends_with():
    texts = check("llama", tiny.prompts(), max_new_tokens=LENGTH, max_time=1e-9, differ=False)
    assert {len(text) for text in texts} == {1}, "no time at all is one token"


class SumStops(StoppingCriteria):
    """Stops where the ids of the whole prefix add up to a multiple: depends on everything before it, not on the last token."""

    def __init__(self, divisor):
        self.divisor = divisor

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.sum(-1) % self.divisor == 0


class LengthStops(StoppingCriteria):
    """A user's criterion that answers with a plain bool, as many do."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= 14


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_users_criterion_is_asked_prefix_by_prefix(num_layers):
    rows = tiny.prompts()
    for divisor in (3, 5, 7):
        check("llama", rows, num_layers, k=5, max_new_tokens=LENGTH, stopping_criteria=StoppingCriteriaList([SumStops(divisor)]))
    both = StoppingCriteriaList([SumStops(5), SumStops(7)])
    check("llama", rows, num_layers, k=5, max_new_tokens=LENGTH, stopping_criteria=both, eos_token_id=35)


def test_a_criterion_that_answers_with_one_bool():
    row, options = tiny.prompts()[0], {"max_new_tokens": LENGTH, "stopping_criteria": StoppingCriteriaList([LengthStops()])}
    sequences = tiny.decoder("llama", 5).generate(tiny.one(row), do_sample=False, **options)
    assert sequences.tolist() == [row + tiny.plain("llama", row, max_new_tokens=LENGTH)[: 14 - len(row)]]


@pytest.fixture(scope="module")
def tokenizer():
    """Token 7 reads "(7)"; strings run over the borders of tokens."""
    words = Tokenizer(
        models.WordLevel({f"({token})": token for token in range(tiny.VOCAB)} | {"abcdef": tiny.VOCAB}, unk_token="(0)")
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="(0)", eos_token="(2)")


@pytest.mark.parametrize("across", [False, True])
def test_stop_strings(tokenizer, across):
    rows = tiny.prompts()
    free = [tiny.plain("llama", row, max_new_tokens=LENGTH) for row in rows]
    tokens = [free[0][4:6], free[1][1:3], free[3][7:9]]
    strings = [f"{a}) ({b}" if across else f"({b})" for a, b in tokens]
    assert tokenizer.decode(tokens[0]) == f"({tokens[0][0]}) ({tokens[0][1]})", "what the strings are made for"
    texts = check("llama", rows, k=5, max_new_tokens=LENGTH, stop_strings=strings, tokenizer=tokenizer)
    assert min(map(len, texts)) < LENGTH, f"no string of {strings} stopped anything"


def test_stop_strings_of_the_generation_config(tokenizer):
    """They may stand in the model's own configuration, which stays as it is."""
    model, row = tiny.build("llama"), tiny.prompts()[0]
    model.generation_config.stop_strings = [f"({tiny.plain('llama', row, max_new_tokens=LENGTH)[5]})"]
    decoder = tiny.MTPDecoder.from_model(model, head=tiny.build_head(model, tiny.row_of("llama")), num_speculative_tokens=3)
    options = {"max_new_tokens": LENGTH, "do_sample": False, "tokenizer": tokenizer}
    expected = model.generate(tiny.one(row), **options)
    assert torch.equal(decoder.generate(tiny.one(row), **options), expected)
    assert expected.shape[1] < len(row) + LENGTH, "the string stopped nothing"
    assert model.generation_config.stop_strings, "the model's own configuration lost its stop strings"
    with pytest.raises(GenerationError, match="without a tokenizer"):
        decoder.generate(tiny.one(row), max_new_tokens=LENGTH)
    own = GenerationConfig(max_new_tokens=LENGTH, do_sample=False)
    assert torch.equal(decoder.generate(tiny.one(row), generation_config=own, tokenizer=tokenizer), expected), (
        "a config of one's own"
    )


def test_padding_of_finished_rows_is_what_transformers_pads_with():
    """Rows of one length, so that plain decoding of the batch is a reference: with a pad token, with another, with none."""
    decoder, batch = tiny.decoder("llama", 3), tiny.padded(tiny.prompts(6, lengths=(5,)))
    for options in ({"pad_token_id": 7}, {"eos_token_id": [11, 35, 6]}, {"eos_token_id": [35, 11, 6], "pad_token_id": 1}):
        options = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": [11, 35]} | options
        expected = decoder.target.generate(**batch, **options)
        assert torch.equal(decoder.generate(**batch, **options), expected), f"{options}"
    model = tiny.build("llama", pad_token_id=None)
    own = tiny.MTPDecoder.from_model(model, head=tiny.build_head(model, tiny.row_of("llama")), num_speculative_tokens=3)
    options = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": [11, 35]}
    assert torch.equal(own.generate(**batch, **options), model.generate(**batch, **options)), "no pad token: the first end token"


def test_finished_rows_stay_as_they_are():
    """The longest row goes on for 60 tokens after the first has ended: what follows in the others is padding."""
    rows = tiny.prompts()
    free = [tiny.plain("llama", row, max_new_tokens=60) for row in rows]
    check("llama", rows, 2, max_new_tokens=60, eos_token_id=[free[0][1], free[2][2]], pad_token_id=tiny.PAD)
