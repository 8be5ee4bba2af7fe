"""Where a row's text ends, by the drawing of `truncate`."""

import torch
from transformers import StoppingCriteria

from mtpdecode.state import DecodeState, Fresh, Text, Verdict
from mtpdecode.stopping import Stopping, truncate

B, C, D, E = 4, 5, 6, 7
EOS = torch.tensor([E])
FAR = 100


def state(lengths, done=None):
    lengths = torch.tensor(lengths)
    rows = len(lengths)
    text = Text(torch.ones(rows, 30, dtype=torch.long), lengths, torch.zeros_like(lengths))
    nothing = Fresh(torch.zeros(rows, 1, 1), torch.zeros_like(lengths))
    return DecodeState(text, nothing, torch.tensor(done or [False] * rows))


def cut(tokens, counts, lengths=(10,), limits=(FAR,), done=None, eos=EOS):
    verdict = Verdict(torch.tensor(tokens), torch.tensor(counts))
    kept, ended = truncate(verdict, state(list(lengths), done), eos, torch.tensor(limits))
    return kept.counts.tolist(), ended.tolist()


def test_the_drawing():
    """b c E d, counts 4 -> counts 3, done."""
    assert cut([[B, C, E, D]], [4]) == ([3], [True])


def test_an_end_token_behind_the_counts_is_no_end():
    """It was refused, or is padding."""
    assert cut([[B, C, E, D]], [2]) == ([2], [False])


def test_the_first_of_several_end_tokens():
    assert cut([[B, D, E, C]], [4], eos=torch.tensor([E, D])) == ([2], [True])
    assert cut([[B, C, D, B]], [4], eos=torch.tensor([], dtype=torch.long)) == ([4], [False]), "no end token at all"


def test_the_budget():
    """10 tokens so far and room for 12: two of four; an exact fit ends, too."""
    assert cut([[B, C, D, B]], [4], limits=[12]) == ([2], [True])
    assert cut([[B, C, D, B]], [4], limits=[14]) == ([4], [True])
    assert cut([[B, C, D, B]], [4], limits=[15]) == ([4], [False])
    assert cut([[B, C, E, B]], [4], limits=[12]) == ([2], [True]), "the budget comes before the end token"


def test_a_row_that_was_done_before():
    assert cut([[B, C, E, D]], [4], done=[True]) == ([0], [True])


def test_rows_end_each_on_their_own():
    counts, done = cut(
        [[B, C, E], [B, C, D], [E, B, C], [B, C, D]], [3, 3, 3, 1], lengths=[5, 6, 7, 8], limits=[FAR, 8, FAR, FAR]
    )
    assert counts == [3, 2, 1, 1]
    assert done == [True, True, True, False]


class Asked(StoppingCriteria):
    """Stops at prefixes of a length, and writes down what it was asked."""

    def __init__(self, length):
        self.length, self.seen = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.tolist())
        return torch.tensor([input_ids.shape[1] >= self.length])


def test_criteria_are_asked_prefix_by_prefix_as_plain_decoding_would():
    criterion = Asked(5)
    stopping = Stopping(EOS, torch.tensor([FAR]), [criterion])
    verdict, done = stopping.truncate(Verdict(torch.tensor([[B, C, D, B]]), torch.tensor([4])), state([3]))
    assert (verdict.counts.tolist(), done.tolist()) == ([2], [True])
    assert criterion.seen == [[[1, 1, 1, B]], [[1, 1, 1, B, C]]], "each prefix once, in order, and none behind the stop"


def test_criteria_are_not_asked_for_rows_that_have_ended():
    criterion = Asked(FAR)
    stopping = Stopping(EOS, torch.tensor([FAR, FAR]), [criterion])
    verdict, done = stopping.truncate(Verdict(torch.tensor([[B, E], [C, D]]), torch.tensor([2, 2])), state([3, 3], [False, True]))
    assert (verdict.counts.tolist(), done.tolist()) == ([2, 0], [True, True])
    assert criterion.seen == [[[1, 1, 1, B]], [[1, 1, 1, B, E]]]


def test_the_first_of_several_criteria():
    stopping = Stopping(EOS, torch.tensor([FAR]), [Asked(6), Asked(5)])
    verdict, _ = stopping.truncate(Verdict(torch.tensor([[B, C, D]]), torch.tensor([3])), state([3]))
    assert verdict.counts.tolist() == [2]
