"""Micro-batches: every row once, within the budget, padded on the right."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.batching import pad_rows, split_by_tokens
from tunesmith.data.rendering import TokenizedExample

CPU = torch.device("cpu")


def test_a_step_is_cut_by_length():
    lengths = np.array([4, 9, 2, 5, 3])
    assert split_by_tokens([0, 1, 2, 3, 4], lengths, 12) == [[1], [3, 0], [4, 2]]  # 9; 2 x 5; 2 x 3
    assert split_by_tokens([0, 1, 2, 3, 4], lengths, 12, most_rows=1) == [[1], [3], [0], [4], [2]]
    assert split_by_tokens([], lengths, 12) == []


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(1, 120),
    st.none() | st.integers(1, 5),
    st.randoms(),
)
def test_each_row_is_in_one_group_within_the_budget(lengths, budget, most_rows, random):
    rows = list(range(len(lengths)))
    random.shuffle(rows)
    groups = split_by_tokens(rows, np.array(lengths), budget, most_rows)
    assert sorted(row for group in groups for row in group) == sorted(rows)
    for group in groups:
        assert len(group) <= (most_rows or len(rows))
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= budget
    visited = [row for group in groups for row in group]
    for first, second in pairwise(visited):  # longest first, ties in the given order
        assert (-lengths[first], rows.index(first)) < (-lengths[second], rows.index(second))


def example(ids: list[int], trained: list[int]) -> TokenizedExample:
    return TokenizedExample(np.array(ids, np.int32), np.array(trained, np.bool_))


def test_rows_are_padded_on_the_right():
    batch = pad_rows([example([5, 6, 7], [0, 0, 1]), example([8, 2], [0, 1])], 2, CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    # The padding id is also the last trained token's: only its place tells padding apart.
    assert batch.trained.tolist() == [[False, False, True], [False, True, False]]
    assert (batch.real_tokens, batch.trained_tokens) == (5, 2)
    assert (batch.input_ids.dtype, batch.attention_mask.dtype) == (torch.int64, torch.int64)
    assert batch.trained.dtype == torch.bool


def test_rows_of_equal_length_need_no_mask():
    batch = pad_rows([example([5, 6], [0, 1]), example([8, 2], [0, 1])], 0, CPU)
    assert batch.attention_mask is None
    assert batch.input_ids.tolist() == [[5, 6], [8, 2]]
