"""The tickets between the roles, by the drawings in their docstrings."""

import torch

from mtpdecode.state import DecodeState, Fresh, Prompt, Text, Verdict

A, B, C, D, E, X, Y, Z = range(1, 9)


def states(*rows):
    """Rows of numbers -> (B, n, 1)."""
    return torch.tensor(rows, dtype=torch.float)[..., None]


def real(fresh):
    """The states that count, as lists."""
    return [row[:count, 0].tolist() for row, count in zip(fresh.states, fresh.counts, strict=True)]


# ── Text ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def drawn_text():
    """The drawing of Text: a b c d, then room."""
    return Text(torch.tensor([[A, B, C, D, 0, 0, 0, 0]]), torch.tensor([4]), torch.tensor([0]))


def test_a_draft_is_written_past_the_end_and_the_lengths_stay():
    text = drawn_text().with_draft(torch.tensor([[X, Y]]))
    assert text.tokens.tolist() == [[A, B, C, D, X, Y, 0, 0]]
    assert text.lengths.tolist() == [4], "drafts are not certain"
    assert drawn_text().with_draft(torch.tensor([[Y]]), start=1).tokens.tolist() == [[A, B, C, D, 0, Y, 0, 0]]


def test_a_draft_is_written_in_place_and_over_the_last_one():
    text = drawn_text()
    text.with_draft(torch.tensor([[X, Y]]))
    drafted = text.with_draft(torch.tensor([[Z]]))
    assert drafted.tokens is text.tokens, "nothing is copied that grows with the text"
    assert text.tokens.tolist() == [[A, B, C, D, Z, Y, 0, 0]]


def test_ragged_rows_draft_at_their_own_ends():
    text = Text(torch.tensor([[A, B, 0, 0, 0], [A, B, C, 0, 0]]), torch.tensor([2, 3]), torch.tensor([0, 0]))
    assert text.with_draft(torch.tensor([[X, Y], [Z, X]])).tokens.tolist() == [[A, B, X, Y, 0], [A, B, C, Z, X]]


def test_a_prefix_is_what_stands_before_a_draft_token():
    text = drawn_text().with_draft(torch.tensor([[X, Y]]))
    assert text.prefix(0).tolist() == [[A, B, C, D]]
    assert text.prefix(0, 1).tolist() == [[A, B, C, D, X]]
    assert text.prefix(0, 2).tolist() == [[A, B, C, D, X, Y]]


def test_a_prompt_of_embeddings_has_no_tokens_to_show():
    """starts 3: the first three slots stand for embeddings, and processors must not see the zeros in them."""
    text = Text(torch.tensor([[0, 0, 0, A, B, 0]]), torch.tensor([5]), torch.tensor([3]))
    assert text.prefix(0).tolist() == [[A, B]]


def test_slots_past_the_end_repeat_the_last():
    assert drawn_text().at(torch.tensor([[0, 3, 99]])).tolist() == [[A, D, 0]]


# ── Fresh ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_last_real_ones():
    """h3 h4 . .  counts 2"""
    drawn = Fresh(states([3, 4, -1, -1]), torch.tensor([2]))
    assert real(drawn.last(1)) == [[4]]
    assert real(drawn.last(2)) == [[3, 4]]
    assert real(drawn.last(3)) == [[3, 4]], "there are no more than two"
    assert drawn.last(3).states.shape == (1, 3, 1), "and the width is what was asked for"


def test_the_last_of_ragged_rows():
    ragged = Fresh(states([3, 4, -1, -1], [5, -1, -1, -1], [-1, -1, -1, -1], [6, 7, 8, 9]), torch.tensor([2, 1, 0, 4]))
    assert real(ragged.last(2)) == [[3, 4], [5], [], [8, 9]]


def test_new_states_stand_behind_the_real_ones():
    """counts 2 and 1 more: h3 h4 h5; what was not real is overwritten."""
    drawn = Fresh(states([3, 4, -1, -1]), torch.tensor([2]))
    longer = drawn.extended(states([5, 6, 7]), torch.tensor([1]), width=5)
    assert real(longer) == [[3, 4, 5]]
    assert longer.states.shape == (1, 5, 1)
    assert real(drawn.extended(states([5, 6, 7]), torch.tensor([3]), width=5)) == [[3, 4, 5, 6, 7]]


def test_new_states_of_ragged_rows():
    old = Fresh(states([3, 4], [5, -1], [-1, -1]), torch.tensor([2, 1, 0]))
    longer = old.extended(states([6, 7], [8, 9], [1, -1]), torch.tensor([0, 2, 1]), width=4)
    assert real(longer) == [[3, 4], [5, 8, 9], [1]]


def test_nothing_is_a_beginning():
    nothing = Fresh(torch.zeros(1, 0, 1), torch.tensor([0]))
    assert real(nothing.extended(states([5, 6]), torch.tensor([2]), width=3)) == [[5, 6]]


def test_extending_and_taking_the_last_keeps_the_order():
    """Any way of cutting ten states into rounds ends with the same last three, in order."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        fresh, number = Fresh(torch.zeros(1, 3, 1), torch.tensor([0])), 0
        while number < 10:
            count = min(int(torch.randint(0, 5, (1,), generator=generator)), 10 - number)
            window = torch.arange(number, number + 4, dtype=torch.float).view(1, 4, 1)
            fresh = fresh.last(3).extended(window, torch.tensor([count]), width=7)
            number += count
        assert real(fresh.last(3)) == [[7, 8, 9]]


# ── DecodeState, Prompt ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_verdict_is_appended_and_no_more_of_it_than_its_counts():
    """Lengths 5 and 3, as drawn; one row gets two of three tokens, the other had finished."""
    tokens = torch.tensor([[A, B, C, D, E, 0, 0, 0], [X, Y, Z, 0, 0, 0, 0, 0]])
    text = Text(tokens, torch.tensor([5, 3]), torch.tensor([0, 0]))
    state = DecodeState(text, Fresh(torch.zeros(2, 1, 1), torch.tensor([1, 1])), torch.tensor([False, True]))
    fresh, done = Fresh(torch.ones(2, 1, 1), torch.tensor([2, 0])), torch.tensor([False, True])
    after = state.appended(Verdict(torch.tensor([[X, Y, Z], [A, A, A]]), torch.tensor([2, 0])), fresh, done)
    assert after.text.lengths.tolist() == [7, 3]
    assert after.text.prefix(0).tolist() == [[A, B, C, D, E, X, Y]]
    assert after.text.prefix(1).tolist() == [[X, Y, Z]]
    assert state.text.lengths.tolist() == [5, 3], "the state before is still what it was"


def test_the_prompts_own_embeddings_stand_where_the_prompt_stands():
    """Rows of 2 and 1 given embeddings; generated tokens keep the table's."""
    given, table = states([10, 20], [30, 99]), states([1, 2, 3], [1, 2, 3])
    prompt = Prompt(torch.zeros(2, 2, dtype=torch.long), torch.tensor([2, 1]), given)
    mixed = prompt.embedded(table, torch.tensor([[0, 1, 2], [0, 1, 2]]))
    assert mixed[..., 0].tolist() == [[10, 20, 3], [30, 2, 3]]
    shifted = prompt.embedded(table, torch.tensor([[1, 2, 3], [1, 2, 3]]))
    assert shifted[..., 0].tolist() == [[20, 2, 3], [1, 2, 3]]
    assert prompt._replace(embeds=None).embedded(table, torch.zeros(2, 3, dtype=torch.long)) is table
