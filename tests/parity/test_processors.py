"""Processors see the true prefix at every drafted position: the text is that of plain decoding, row by row."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, WatermarkingConfig
from transformers.generation import logits_process as hf

from mtpdecode import MTPProposer
from mtpdecode.sampling import TOGETHER, Sampler
from mtpdecode.state import Text
from tests import tiny

LENGTH = 20

OPTIONS = {
    "repetition_penalty": {"repetition_penalty": 1.6},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[6], [35, 11], [3, 30, 38]]},
    "suppress_tokens": {"suppress_tokens": [6, 11, 30]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 30))},
    "sequence_bias": {"sequence_bias": [[[35], 3.0], [[28, 13], -8.0]]},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": [11, 35, 6, 30]},
    "min_length": {"min_length": 15, "eos_token_id": [11, 35, 6, 30]},
    "forced_eos_token_id": {"forced_eos_token_id": 17},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 40},
    "forced_bos_token_id": {"forced_bos_token_id": 5},
    "several": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 6, "eos_token_id": [11, 35, 30]},
}
"""Each of them changes the text of the prompts below (the tests see to it)."""

SPARE = {"max_new_tokens": LENGTH, "do_sample": False}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("num_layers", [1, 3])
def test_every_processor_is_exact_for_every_row(options, num_layers):
    """The reference is each row alone with the same arguments; min_length counts the padding, as in a batch of transformers."""
    rows, decoder = tiny.prompts(), tiny.decoder("llama", 3, num_layers)
    expected = [tiny.plain("llama", row, **SPARE, **_of_row(options, row)) for row in rows]
    assert expected != [tiny.plain("llama", row, **SPARE) for row in rows], f"{options} changes nothing here: a test of nothing"
    sequences = decoder.generate(**tiny.padded(rows), **SPARE, **options)
    tiny.assert_rows(sequences, 9, expected, f"{options}")
    lengths = {len(text) for text in expected}
    assert len(lengths) > 1 or "eos_token_id" not in options, f"rows must end at different places with {options}: {lengths}"


def _of_row(options, row):
    """min_length, said for the padded batch, means so many tokens fewer for a row that is shorter."""
    return options | ({"min_length": options["min_length"] - (9 - len(row))} if "min_length" in options else {})


ENDS = torch.tensor([4, -1, 90])  # ids that are none are passed over

TOGETHER_CASES = [
    hf.RepetitionPenaltyLogitsProcessor(1.7),
    hf.RepetitionPenaltyLogitsProcessor(0.6, prompt_ignore_length=6),
    hf.MinLengthLogitsProcessor(11, ENDS),
    hf.MinNewTokensLengthLogitsProcessor(9, 3, ENDS),
]


@pytest.mark.parametrize("processor", TOGETHER_CASES, ids=lambda each: type(each).__name__)
def test_rows_together_are_rows_one_by_one(processor, monkeypatch):
    """Ragged rows, one that begins late, and tokens past the end: bit by bit what the slow way makes of them."""
    chance = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 20, (3, 20), generator=chance)
    text, logits = Text(tokens, torch.tensor([9, 5, 12]), torch.tensor([0, 0, 9])), torch.randn(3, 4, 20, generator=chance)
    together = Sampler([processor], False, [0, 4, 0])
    monkeypatch.setattr("mtpdecode.sampling.TOGETHER", {})
    alone = Sampler([processor], False, [0, 4, 0])
    assert (together.asks_row_by_row, alone.asks_row_by_row) == (False, True)
    assert torch.equal(together.scores(logits, text), alone.scores(logits, text))
    assert not torch.equal(alone.scores(logits, text), logits), "a test of nothing"


def test_ids_that_logits_do_not_know_are_passed_over():
    """Embeddings may have more rows than the output layer."""
    sampler, logits = Sampler([hf.RepetitionPenaltyLogitsProcessor(1.7)], False, [0]), torch.randn(1, 1, 20)
    known, unknown = (Text(torch.tensor([row]), torch.tensor([3]), torch.tensor([0])) for row in ([3, 3, 5], [3, 20, 5]))
    assert torch.equal(sampler.scores(logits, known), sampler.scores(logits, unknown))


def test_every_case_of_rows_together_is_tested():
    assert {type(each) for each in TOGETHER_CASES} == set(TOGETHER)


def test_a_watermark_is_written_at_every_place():
    rows, decoder = tiny.prompts(), tiny.decoder("llama", 3)
    options = {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="lefthash")}
    expected = [tiny.alone(decoder.target, row, **SPARE, **options) for row in rows]
    assert expected != [tiny.plain("llama", row, **SPARE) for row in rows]
    tiny.assert_rows(decoder.generate(**tiny.padded(rows), **SPARE, **options), 9, expected, "a watermark")


@pytest.mark.parametrize("name", ["sliding", "glm4_moe", "deepseek_v3", "mimo"])
def test_processors_in_every_family(name):
    rows, options = tiny.prompts(), {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2, "suppress_tokens": [7]}
    expected = [tiny.plain(name, row, **SPARE, **options) for row in rows]
    sequences = tiny.decoder(name, 3, 2).generate(**tiny.padded(rows), **SPARE, **options)
    tiny.assert_rows(sequences, 9, expected, f"{name}, {options}")


def test_prefix_allowed_tokens_fn_is_told_the_row():
    """A grammar per row: row b may only write tokens that leave remainder b, and never the one that it wrote last."""
    rows, decoder = tiny.prompts(), tiny.decoder("llama", 3)

    def allowed(row, ids):
        assert ids.dim() == 1, "the function sees the ids of one row"
        return [token for token in range(3, tiny.VOCAB) if token % 5 == row and token != int(ids[-1])]

    sequences = decoder.generate(**tiny.padded(rows), **SPARE, prefix_allowed_tokens_fn=allowed)
    for number, row in enumerate(rows):

        def alone(_, ids, number=number):
            return allowed(number, ids)

        expected = tiny.alone(decoder.target, row, **SPARE, prefix_allowed_tokens_fn=alone)
        assert sequences[number, 9:].tolist() == expected, f"row {number}"


class Leaning(LogitsProcessor):
    """A user's own: leans towards a token that the whole prefix decides, and writes down the prefixes that it was shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0] == 1, "row by row, as if each were alone"
        prefix = input_ids[0].tolist()
        self.seen.append(tuple(prefix))
        scores = scores.clone()
        scores[:, 3 + sum((place + 1) * token for place, token in enumerate(prefix)) % (tiny.VOCAB - 3)] += 2.0
        return scores


class Remembering(MTPProposer):
    """Writes down what was drafted behind which text."""

    def __init__(self, head):
        super().__init__(head)
        self.drafts = []

    def propose(self, state, num_speculative_tokens, noise):
        draft = super().propose(state, num_speculative_tokens, noise)
        for row, tokens in enumerate(draft.tokens.tolist()):
            self.drafts.append((tuple(state.text.prefix(row)[0].tolist()), tokens))
        return draft


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_users_processor_is_shown_true_prefixes_only(num_layers):
    """What stands before an accepted token is the text up to it; all else that it sees is a draft behind a true prefix."""
    rows, processor = tiny.prompts(), Leaning()
    proposer = Remembering(tiny.head("llama", num_layers))
    decoder = tiny.MTPDecoder.from_model(tiny.target("llama"), proposer=proposer, num_speculative_tokens=3)
    sequences = decoder.generate(**tiny.padded(rows), **SPARE, logits_processor=LogitsProcessorList([processor]))
    expected = [tiny.alone(decoder.target, row, **SPARE, logits_processor=LogitsProcessorList([Leaning()])) for row in rows]
    tiny.assert_rows(sequences, 9, expected, "a user's processor")

    texts = [row + new for row, new in zip(rows, expected, strict=True)]
    true = {tuple(text[:n]) for row, text in zip(rows, texts, strict=True) for n in range(len(row), len(text))}
    assert true <= set(processor.seen), "the prefix of some accepted token was never shown"
    branches = {text + tuple(tokens[:n]) for text, tokens in proposer.drafts for n in range(len(tokens) + 1)}
    strangers = {prefix for prefix in processor.seen if prefix not in true | branches}
    assert not strangers, f"shown, but neither text nor a draft behind it: {sorted(strangers)[:3]}"
    rejected = branches - true
    assert rejected & set(processor.seen), "no draft was refused here: a test of nothing"
    assert all(text in true | {tuple(t) for t in texts} for text, _ in proposer.drafts), "a draft began behind another text"


def test_a_processor_with_sampling_is_exact_on_the_drafts_too():
    """Tokens that a processor forbids are never sampled, however the draft was drawn."""
    rows = tiny.prompts()
    options = {"max_new_tokens": LENGTH, "do_sample": True, "suppress_tokens": [6, 11, 30], "seed": 2}
    for sampling in ("sample", "greedy"):
        sequences = tiny.decoder("llama", 3).generate(**tiny.padded(rows), **options, draft_sampling=sampling)
        assert not set(sequences[:, 9:].flatten().tolist()) & {6, 11, 30}, f"a forbidden token with draft_sampling={sampling!r}"


def test_a_grammar_that_forbids_all_that_the_head_can_say():
    """The head drafts over half of the vocabulary, the grammar allows the other half only: slow, and right."""
    model, row = tiny.target("llama"), tiny.prompts()[0]
    odd, even = list(range(3, tiny.VOCAB, 2)), torch.arange(0, tiny.VOCAB, 2)
    head = tiny.build_head(model, tiny.row_of("llama"), draft_vocabulary=even)
    decoder = tiny.MTPDecoder.from_model(model, head=head, num_speculative_tokens=2)
    options = {"prefix_allowed_tokens_fn": lambda *_: odd}
    expected = tiny.alone(model, row, **SPARE, **options)
    assert decoder.generate(tiny.one(row), **SPARE, **options).tolist() == [row + expected]
    sampled = decoder.generate(tiny.one(row), max_new_tokens=LENGTH, do_sample=True, seed=0, **options)[0, len(row) :]
    assert set(sampled.tolist()) <= set(odd), "sampling left the grammar"
