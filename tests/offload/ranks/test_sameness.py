"""Ranks that do not have the same model are refused, rather than mixed."""

from __future__ import annotations

import datetime
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from deep_zoo import saved
from fake_post import Office
from rank_threads import policy_of

from penstock.io.errors import RanksError, UsageError
from penstock.offload.model import load_for, unwrap
from penstock.offload.ranks.sameness import check_same
from penstock.scheduler.ranks.lockstep import agreed


@pytest.fixture
def policy(tmp_path: Path) -> Any:
    io = {"reader": "threads", "cache": tmp_path / "cache"}
    return policy_of("600KiB", io=io)


def test_another_rank_with_other_weights_is_refused(
    tmp_path: Path, policy: Any
) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    saved("llama", first, 5)
    shutil.copytree(first, other)
    with sorted(other.glob("*.safetensors"))[-1].open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    posts = Office(2, 0).posts
    with load_for("any", first, policy, post=posts[0]):
        with pytest.raises(UsageError, match=r"rank 1 .*: model.*\.safetensors \("):
            load_for("any", other, policy, post=posts[1])
        posts[0].wait(lambda: bool(posts[0].mail._closed))
        with pytest.raises(RanksError, match=r"rank 1 has failed: .*safetensors"):
            posts[0].mail.is_confirmed(1, 0, [1])


def test_other_options_are_named_with_both_values() -> None:
    first, other = Office(2, 0).posts
    check_same(first, {"task": "score", "top": 1}, "penstock score")
    with pytest.raises(UsageError, match=r"top \(2, there 1\) \(penstock score\)"):
        check_same(other, {"task": "score", "top": 2}, "penstock score")


def test_what_json_cannot_hold_is_no_text_on_other_ranks() -> None:
    first, other = Office(2, 0).posts
    agreed(first, {"text": b"hello", "at": datetime.date(2026, 1, 1)})
    found = agreed(other, None)
    assert found == {"text": {"type": "bytes"}, "at": {"type": "date"}}


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("tokens_in_flight=64", r"tokens_in_flight \(64, there 4096\)"),
        ("coalesce=off", r"coalesce \(off, there auto\)"),
        ("kv.attention=host", r"kv.attention \(host, there device\)"),
        ("host_memory=1MiB", None),
        ("io.depth=2", None),
    ],
)
def test_policies_that_give_other_results_are_named(
    setting: str, named: str | None, tmp_path: Path, policy: Any
) -> None:
    """Where weights stay, and how they are read, may differ."""
    folder, posts = tmp_path / "model", Office(2, 0).posts
    saved("llama", folder, 5)
    other = policy.with_settings([setting])
    refused = nullcontext() if named is None else pytest.raises(UsageError, match=named)
    with load_for("any", folder, policy, post=posts[0]), refused:
        unwrap(load_for("any", folder, other, post=posts[1]))
