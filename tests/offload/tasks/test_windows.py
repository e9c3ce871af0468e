"""Texts longer than a model's context are scored in windows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.offload.tasks.score import spans


@given(st.data())
def test_windows_score_every_token_once_with_enough_context(
    data: st.DataObject,
) -> None:
    length = data.draw(st.integers(2, 200))
    first = data.draw(st.integers(1, length - 1))
    window = data.draw(st.integers(2, 80))
    stride = data.draw(st.integers(1, window - 1))
    scored: list[int] = []
    for start, end, begin in spans(length, first, window=window, stride=stride):
        assert 0 <= start < begin < end <= length
        assert end - start <= window
        assert begin - start >= min(begin, window - stride)
        scored += range(begin, end)
    assert scored == list(range(first, length))


@pytest.mark.parametrize("stride", [0, 10, 11])
def test_a_stride_that_skips_or_stands_still_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match="stride"):
        spans(20, 1, window=10, stride=stride)
