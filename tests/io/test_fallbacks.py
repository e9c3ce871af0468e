"""Fallbacks are announced once, and remembered in order."""

from __future__ import annotations

import pytest

from penstock.io.fallbacks import Fallbacks


def test_a_fallback_is_logged_once_and_remembered_in_order(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fallbacks = Fallbacks()
    for sentence in ("no O_DIRECT", "100% of it unpinned", None, "no O_DIRECT"):
        fallbacks.announce(sentence)
    assert [*fallbacks] == ["no O_DIRECT", "100% of it unpinned"]
    assert [record.getMessage() for record in caplog.records] == [*fallbacks]
    assert {(r.name, r.levelname) for r in caplog.records} == {("penstock", "WARNING")}


def test_a_fallback_may_be_announced_while_they_are_read() -> None:
    fallbacks = Fallbacks()
    fallbacks.announce("one")
    for sentence in fallbacks:
        fallbacks.announce(f"{sentence}, and one more")
    assert len([*fallbacks]) == 2
