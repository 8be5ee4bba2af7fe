"""What the benchmarks count, padded and timed: a wrong counter gives a wrong claim."""

import torch

from benchmarks import common

END = 2


def test_new_tokens_end_with_the_first_end_token():
    """Padding behind it may be the end token again, and counts for nothing."""
    row = torch.tensor([9, 9, 5, 6, END, END, END])
    assert common.new_tokens(row, 2, [END]) == [5, 6, END]
    assert common.new_tokens(row, 2, [7]) == [5, 6, END, END, END]


def test_left_padding_hides_what_it_adds():
    rows = [common.Prompt("chat", "", [4]), common.Prompt("chat", "", [5, 6, 7])]
    inputs = common.left_padded(rows, END)
    assert inputs["input_ids"].tolist() == [[END, END, 4], [5, 6, 7]]
    assert inputs["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_json_has_null_for_nan_and_four_digits():
    assert common.plain({"a": [float("nan"), 1 / 3], 2: (float("inf"), 5)}) == {"a": [None, 0.3333], "2": [None, 5]}


def test_spread_of_one_value_is_that_value():
    assert common.spread([3.0]) == {"median": 3.0, "q1": 3.0, "q3": 3.0}
    assert common.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
