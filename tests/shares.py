"""Marks the cases of a product that run each time; the others need `--whole`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest


def shared(cases: Sequence[Any], is_kept: Callable[[int, Any], bool]) -> list[Any]:
    """`cases` as parameters; those that are not kept, by place and value, are marked
    `whole`. A case of several values is a tuple."""
    found = []
    for place, case in enumerate(cases):
        marks = [] if is_kept(place, case) else [pytest.mark.whole]
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=marks))
    return found


def in_turns(rows: Sequence[Any], columns: Sequence[Any], num: int = 1) -> list[Any]:
    """All pairs, of which `num` columns for each row are kept, in turns: every row and,
    of enough rows, every column comes."""
    kept = {
        (row, columns[(place * num + turn) % len(columns)])
        for place, row in enumerate(rows)
        for turn in range(num)
    }
    return shared(list(product(rows, columns)), lambda _, case: case in kept)
