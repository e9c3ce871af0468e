"""Rows into micro-batches, long rows into windows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.scheduler.packing import alike, chunk_tokens, pack

LENGTHS = st.lists(st.integers(1, 300), max_size=60)


@given(LENGTHS, st.integers(1, 600))
def test_every_row_is_in_exactly_one_micro_batch_within_the_budget(
    lengths: list[int], max_tokens: int
) -> None:
    groups = pack(lengths, max_tokens=max_tokens)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[row] for row in group)
        assert len(group) == 1 or len(group) * longest <= max_tokens


def test_rows_of_similar_length_share_a_micro_batch() -> None:
    assert pack([10, 100, 11, 99], max_tokens=200) == ((1, 3), (2, 0))


def test_equal_lengths_need_no_padding() -> None:
    groups = pack([8] * 16, max_tokens=32)
    assert [len(group) for group in groups] == [4, 4, 4, 4]


@given(st.integers(0, 60), st.integers(1, 90), st.integers(1, 400))
def test_rows_that_are_all_alike_are_grouped_as_if_each_were_looked_at(
    num_rows: int, length: int, max_tokens: int
) -> None:
    groups = pack([length] * num_rows, max_tokens=max_tokens)
    sizes = alike(num_rows, length, max_tokens=max_tokens)
    assert sizes == tuple(len(group) for group in groups)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        pack([1], max_tokens=0)


@given(
    st.integers(1, 64), st.integers(1, 300), st.integers(1, 9_000), st.integers(1, 900)
)
def test_chunks_of_prompts_make_a_pass_worth_its_weights(
    num_rows: int, num_groups: int, tokens_in_flight: int, max_tokens: int
) -> None:
    chunk = chunk_tokens(
        num_rows, num_groups, tokens_in_flight=tokens_in_flight, max_tokens=max_tokens
    )
    rounded = num_rows * (chunk + 1) - 1  # a call has whole tokens of each row
    assert rounded >= max_tokens
    assert num_groups * rounded >= tokens_in_flight
    smaller = (chunk - 1) * num_rows
    assert smaller < max_tokens or smaller * num_groups < tokens_in_flight
