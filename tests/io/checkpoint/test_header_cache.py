"""Headers that were read once are not read again, unless a file differs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import random_tensor, write_checkpoint
from penstock.io.checkpoint import header_cache, index
from penstock.io.checkpoint.header import read_text
from penstock.io.checkpoint.index import INDEX_FILE, Checkpoint, open_checkpoint
from penstock.io.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose headers are read."""
    names: list[str] = []

    def recorded(path: Path) -> Any:
        names.append(path.name)
        return read_text(path)

    monkeypatch.setattr(index, "read_text", recorded)
    monkeypatch.setattr(header_cache, "MIN_TENSORS", 1)
    return names


def stored(folder: Path) -> list[str]:
    """Writes a checkpoint of three files to `folder`. Returns their names."""
    kinds = [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.float32]
    tensors = {
        f"layers.{i}.weight": random_tensor(kinds[i % 4], (i, 3), seed=i)
        for i in range(12)
    }
    write_checkpoint(folder, tensors, num_shards=3)
    index_of = json.loads((folder / INDEX_FILE).read_text())
    return sorted(set(index_of["weight_map"].values()))


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return dict(one.entries) == dict(other.entries) and one.stamps == other.stamps


def test_a_second_start_reads_no_header(tmp_path: Path, read: list[str]) -> None:
    names = stored(tmp_path)
    plain = open_checkpoint(tmp_path)
    assert sorted(read) == names
    first = open_checkpoint(tmp_path, tmp_path / "caches")
    read.clear()
    second = open_checkpoint(tmp_path, tmp_path / "caches")
    assert read == []
    assert same(first, plain)
    assert same(second, plain)
    assert list(second.entries) == list(plain.entries)


def test_only_the_file_that_changed_is_read_again(
    tmp_path: Path, read: list[str]
) -> None:
    names = stored(tmp_path)
    open_checkpoint(tmp_path, tmp_path / "caches")
    os.utime(tmp_path / names[1], (1, 1))
    read.clear()
    made = open_checkpoint(tmp_path, tmp_path / "caches")
    assert read == [names[1]]
    assert same(made, open_checkpoint(tmp_path))
    read.clear()
    open_checkpoint(tmp_path, tmp_path / "caches")
    assert read == []


def test_few_tensors_are_not_kept(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header_cache, "MIN_TENSORS", 1000)
    stored(tmp_path)
    open_checkpoint(tmp_path, tmp_path / "caches")
    assert not (tmp_path / "caches").exists()


def sealed(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Changes what a cache says, and seals it again."""

    def damage(cache: Path) -> None:
        content = json.loads(cache.read_bytes().partition(b"\n")[2])
        change(content)
        text = json.dumps(content).encode()
        cache.write_bytes(header_cache._seal(text) + text)

    return damage


def first(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content[min(content)]
    return found


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": lambda cache: cache.write_bytes(cache.read_bytes()[:-5]),
    "one byte": lambda cache: cache.write_bytes(
        cache.read_bytes().replace(b"layers.7", b"layers.9", 1)
    ),
    "empty": lambda cache: cache.write_bytes(b""),
    "not json": lambda cache: cache.write_bytes(header_cache._seal(b"[") + b"["),
    "a list": lambda cache: cache.write_bytes(header_cache._seal(b"[]") + b"[]"),
    "another version": lambda cache: cache.write_bytes(
        cache.read_bytes().replace(b"headers 1", b"headers 0", 1)
    ),
    "no columns": sealed(lambda content: first(content).clear()),
    "a name less": sealed(lambda content: first(content)["names"].pop()),
    "another dtype": sealed(lambda c: first(c)["dtypes"].__setitem__(0, "Q1")),
    "a larger shape": sealed(lambda c: first(c)["shapes"].__setitem__(0, [1 << 40])),
    "a shape of words": sealed(lambda c: first(c)["shapes"].__setitem__(0, ["a"])),
    "a negative shape": sealed(lambda c: first(c)["shapes"].__setitem__(1, [-1, 3])),
    "no stamp": sealed(lambda content: first(content)["stamp"].clear()),
    "a stamp of words": sealed(lambda c: first(c)["stamp"].__setitem__(0, "a")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_ignored_and_written_again(
    damage: Callable[[Path], Any], tmp_path: Path, read: list[str]
) -> None:
    stored(tmp_path)
    plain = open_checkpoint(tmp_path)
    open_checkpoint(tmp_path, tmp_path / "caches")
    (cache,) = (tmp_path / "caches").glob("*.json")
    damage(cache)
    read.clear()
    assert same(open_checkpoint(tmp_path, tmp_path / "caches"), plain)
    assert read
    read.clear()
    assert same(open_checkpoint(tmp_path, tmp_path / "caches"), plain)
    assert read == []


def test_a_cache_that_cannot_be_written_is_no_matter(
    tmp_path: Path, read: list[str]
) -> None:
    stored(tmp_path)
    (tmp_path / "caches").write_text("a file")
    assert same(
        open_checkpoint(tmp_path, tmp_path / "caches"), open_checkpoint(tmp_path)
    )


def test_a_file_that_became_wrong_is_refused_as_ever(
    tmp_path: Path, read: list[str]
) -> None:
    names = stored(tmp_path)
    open_checkpoint(tmp_path, tmp_path / "caches")
    with (tmp_path / names[0]).open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="4 bytes after its last tensor"):
        open_checkpoint(tmp_path, tmp_path / "caches")


def test_old_caches_are_removed(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header_cache, "MAX_CACHES", 2)
    folders = [tmp_path / str(number) for number in range(3)]
    for age, folder in enumerate(folders):
        folder.mkdir()
        stored(folder)
        open_checkpoint(folder, tmp_path / "caches")
        for cache in (tmp_path / "caches").iterdir():
            before = cache.stat().st_mtime
            os.utime(cache, (before - 100, before - 100))
        assert len(list((tmp_path / "caches").iterdir())) == min(age + 1, 2)
    read.clear()
    open_checkpoint(folders[2], tmp_path / "caches")
    assert read == []
    open_checkpoint(folders[0], tmp_path / "caches")
    assert read
