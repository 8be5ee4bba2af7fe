"""A draft vocabulary changes what is drafted, and nothing else."""

import pytest
import torch

from mtpdecode import DraftVocabulary, GenerationError, MTPDecoder, NGramProposer
from mtpdecode.vocabulary import draft_ids
from tests import tiny

SOME = [3, 4, 8, 11, 30, 35]


class Letters:
    """A tokenizer: every letter is a token."""

    eos_token_id = 2

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - ord("a") + 3 for letter in text]}


def test_the_most_frequent_ids_of_a_text_and_its_end():
    found = DraftVocabulary.from_texts(["aaab", "bbcccc"], Letters(), size=2)
    assert found.ids.tolist() == [2, 3, 5], "the end of text, a (three times) and c (four times); b comes third"
    assert found.coverage == pytest.approx(7 / 10)


@pytest.mark.parametrize(("texts", "size"), [([], 5), ([""], 5), (["a"], 0)])
def test_nothing_to_count(texts, size):
    with pytest.raises(GenerationError, match="Give some text, and a size of at least 1"):
        DraftVocabulary.from_texts(texts, Letters(), size)


@pytest.mark.parametrize("asked", [SOME, tuple(SOME), torch.tensor(SOME), DraftVocabulary(torch.tensor(SOME))])
def test_only_these_ids_are_drafted_and_the_text_stays(asked):
    model, head = tiny.target("llama"), tiny.head("llama")
    decoder = MTPDecoder.from_model(model, head=head, draft_vocabulary=asked, num_speculative_tokens=3)
    drafted = []
    logits = decoder.head.logits
    decoder.head.logits = lambda *args: drafted.append(decoder.head.token_ids(logits(*args).argmax(-1))) or logits(*args)
    rows = tiny.prompts()
    sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=16, do_sample=False)
    tiny.assert_rows(sequences, 9, [tiny.plain("llama", row, max_new_tokens=16) for row in rows], "six ids")
    assert set(torch.cat(drafted).tolist()) <= set(SOME)
    assert head.draft_vocabulary is None, "the head that was given is as it was"
    assert decoder.head.layers is head.layers, "its weights are not copied"


def test_a_number_counts_from_the_first_id():
    assert draft_ids(4, 48).tolist() == [0, 1, 2, 3]
    assert len(draft_ids(1000, 48)) == 48


@pytest.mark.parametrize("asked", [[], [3, 3], [48], [-1], 0, [[1, 2]]])
def test_lists_that_are_none(asked):
    with pytest.raises(GenerationError, match=r"different ids in 0\.\.47"):
        draft_ids(asked, 48)


def test_no_head_no_vocabulary():
    with pytest.raises(GenerationError, match="proposer"):
        MTPDecoder.from_model(tiny.target("llama"), proposer=NGramProposer(), draft_vocabulary=SOME)
