"""The demo: as many rows as a slow machine does in a minute."""

from __future__ import annotations

import ast

import demo


def test_as_many_rows_are_taken_as_fit_into_the_time() -> None:
    lengths = [100.0] * 72
    assert demo.rows_for(60.0, 1e6, lengths) == 72
    assert demo.rows_for(60.0, 27.0, lengths) == 16
    assert demo.rows_for(60.0, 0.01, lengths) == demo.LEAST_ROWS
    assert demo.rows_for(60.0, 0.01, lengths[:2]) == 2


def test_each_of_the_texts_has_a_length() -> None:
    lengths = demo.lengths_of(demo.TEXTS.read_text().splitlines())
    assert len(lengths) == 72
    assert min(lengths) > 1


def test_the_demo_imports_nothing_of_penstock_but_its_face() -> None:
    with open(demo.__file__) as file:
        tree = ast.parse(file.read())
    names = [
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    assert [name for name in names if name.startswith("penstock")] == ["penstock"]
