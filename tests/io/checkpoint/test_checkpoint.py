"""A checkpoint is one file, or the shards that its index names, and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import (
    entry,
    random_tensor,
    shard_name,
    write_checkpoint,
    write_index,
    write_raw,
)
from conftest import TinyCheckpoint
from penstock.io.checkpoint.header import FileStamp
from penstock.io.checkpoint.index import (
    INDEX_FILE,
    SINGLE_FILE,
    open_checkpoint,
    open_files,
)
from penstock.io.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("no_leaks")

TENSORS = {
    "a": (torch.float32, (3, 5)),
    "b": (torch.bfloat16, (7,)),
    "c": (torch.int64, ()),
    "d": (torch.float16, (0, 4)),
}


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_all_tensors_of_all_files_are_found(
    num_shards: int, tiny_checkpoint: TinyCheckpoint
) -> None:
    folder = tiny_checkpoint(TENSORS, num_shards=num_shards)
    checkpoint = open_checkpoint(folder)
    assert {n: (e.dtype, e.shape) for n, e in checkpoint.entries.items()} == TENSORS
    assert checkpoint.num_bytes == 3 * 5 * 4 + 7 * 2 + 8
    assert checkpoint.folder == folder
    assert checkpoint.stamps == {
        path: FileStamp.of(path.stat()) for path in folder.glob("*.safetensors")
    }


def test_a_folder_may_be_given_as_text(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(TENSORS)
    assert open_checkpoint(str(folder)) == open_checkpoint(folder)


def test_a_checkpoint_cannot_be_changed(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(TENSORS))
    with pytest.raises(TypeError):
        checkpoint.entries["e"] = checkpoint.entries["a"]  # type: ignore[index]


def test_links_into_a_cache_of_blobs_are_followed(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    blobs = tiny_checkpoint(TENSORS, num_shards=2)
    for path in blobs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.entries) == set(TENSORS)
    blob = next(blobs.glob("*.safetensors"))
    assert checkpoint.stamps[tmp_path / blob.name] == FileStamp.of(blob.stat())


def test_the_single_file_goes_before_an_index_as_in_transformers(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    folder = tiny_checkpoint(TENSORS, num_shards=2)
    save_file({"only": torch.zeros(3)}, folder / SINGLE_FILE)
    assert set(open_checkpoint(folder).entries) == {"only"}


def test_a_tensor_that_the_index_forgets_is_found(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    folder = tiny_checkpoint(TENSORS, num_shards=2)
    write_index(folder, {"a": shard_name(0, 2), "b": shard_name(1, 2)})
    assert set(open_checkpoint(folder).entries) == set(TENSORS)


def test_only_the_files_that_are_named_are_opened(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    folder = tiny_checkpoint(TENSORS, num_shards=2)
    (folder / "consolidated.safetensors").write_bytes(b"no safetensors file")
    assert set(open_checkpoint(folder).entries) == set(TENSORS)


Damage = Callable[[Path], object]
FIRST, SECOND = shard_name(0, 2), shard_name(1, 2)


def _index_of(content: bytes) -> Damage:
    return lambda folder: (folder / INDEX_FILE).write_bytes(content)


def _names(name: Any) -> Damage:
    return lambda folder: write_index(folder, {"a": name})


def _becomes_folder(name: str) -> Damage:
    def act(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return act


def _becomes_pipe(name: str) -> Damage:
    def act(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return act


def _becomes_zeros(name: str) -> Damage:
    def act(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return act


def _dangle(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(folder / "gone")


def _truncate(folder: Path) -> None:
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "missing_shard": (lambda f: (f / SECOND).unlink(), SECOND, "missing"),
    "dangling_link": (
        _dangle,
        SECOND,
        "missing",
    ),
    "truncated_shard": (_truncate, SECOND, "truncated"),
    "shard_is_a_folder": (
        _becomes_folder(SECOND),
        SECOND,
        "cannot read",
    ),
    "duplicated_name": (
        lambda f: save_file({"a": torch.zeros(2), "b": torch.ones(3)}, f / SECOND),
        SECOND,
        "'a' is in two files",
    ),
    "tensor_not_in_its_shard": (
        lambda f: write_index(f, {"a": FIRST, "b": FIRST, "c": SECOND}),
        INDEX_FILE,
        "'b' is in",
    ),
    "tensor_nowhere": (
        lambda f: write_index(f, {"a": FIRST, "z": SECOND}),
        INDEX_FILE,
        "'z' is in",
    ),
    "absent_file": (_names("other.safetensors"), "other.safetensors", "missing"),
    "path_upwards": (_names("../x.safetensors"), INDEX_FILE, "not a file beside it"),
    "path_downwards": (_names("sub/x.safetensors"), INDEX_FILE, "not a file beside it"),
    "absolute_path": (_names("/etc/x.safetensors"), INDEX_FILE, "not a file beside it"),
    "parent_folder": (_names(".."), INDEX_FILE, "not a file beside it"),
    "this_folder": (_names("."), INDEX_FILE, "not a file beside it"),
    "empty_name": (_names(""), INDEX_FILE, "not a file beside it"),
    "number_as_name": (_names(17), INDEX_FILE, "not a file beside it"),
    "list_as_name": (_names([FIRST]), INDEX_FILE, "not a file beside it"),
    "null_in_name": (_names("\0.safetensors"), INDEX_FILE, "not a file beside it"),
    "surrogate_in_name": (_names("\ud800.safetensors"), "shard", "missing"),
    "endless_name": (_names("x" * 300 + ".safetensors"), INDEX_FILE, "beside it"),
    "pickle_as_shard": (_names("a.bin"), INDEX_FILE, "not a file beside it"),
    "no_tensors": (lambda f: write_index(f, {}), INDEX_FILE, "must map"),
    "list_of_files": (lambda f: write_index(f, [FIRST]), INDEX_FILE, "must map"),
    "no_weight_map": (_index_of(b"{}"), INDEX_FILE, "weight_map must map"),
    "index_is_a_list": (_index_of(b"[]"), INDEX_FILE, "must hold an object"),
    "index_is_no_json": (_index_of(b'{"weight_map'), INDEX_FILE, "not valid JSON"),
    "index_is_no_text": (_index_of(b"\xff\xfe\x80"), INDEX_FILE, "not valid JSON"),
    "index_is_too_deep": (_index_of(b"[" * 200_000), INDEX_FILE, "too deep"),
    "index_is_a_folder": (_becomes_folder(INDEX_FILE), INDEX_FILE, "cannot read"),
    "shard_is_a_pipe": (_becomes_pipe(SECOND), SECOND, "cannot read"),
    "index_is_a_device": (_becomes_zeros(INDEX_FILE), INDEX_FILE, "cannot read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(
    damage: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    folder = tiny_checkpoint(TENSORS, num_shards=2)
    act, file, says = DAMAGES[damage]
    act(folder)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert file in message
    assert says in message
    if says != "cannot read":
        assert "again" in message or "download" in message, "says what to do"


def test_a_shard_outside_of_the_folder_is_never_opened(tmp_path: Path) -> None:
    secret = write_checkpoint(tmp_path / "secret", {"a": torch.zeros(3)})
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in (f"../secret/{SINGLE_FILE}", str(secret / SINGLE_FILE)):
        write_index(folder, {"a": name})
        with pytest.raises(CheckpointError, match="not a file beside it"):
            open_checkpoint(folder)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "give the folder of a downloaded"),
        (["config.json"], "give the folder of a downloaded"),
        (["pytorch_model.bin"], "it has pytorch_model.bin, which is another format"),
        (["b.gguf", "config.json"], "it has b.gguf, which is another format"),
    ],
    ids=["nothing", "only_config", "only_bin", "only_gguf"],
)
def test_a_folder_without_safetensors_says_what_to_give(
    files: list[str], says: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    file = write_raw(tmp_path / SINGLE_FILE, {"a": entry("U8", [1], 0, 1)}, data=b"x")
    for path in (file, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="is not a folder; give") as caught:
            open_checkpoint(path)
        assert str(path) in str(caught.value)


def test_the_error_of_a_shard_names_the_shard(tmp_path: Path) -> None:
    for name in ("x.safetensors", "y.safetensors"):
        save_file({name: random_tensor(torch.float32, (3,))}, tmp_path / name)
    header = {"z": entry("U8", [9], 0, 9)}
    write_raw(tmp_path / "y.safetensors", header, data=b"short")
    with pytest.raises(CheckpointError, match=r"y\.safetensors is truncated"):
        open_files(tmp_path, ["x.safetensors", "y.safetensors"])


def test_an_index_may_hold_more_than_it_must(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(TENSORS, num_shards=2)
    path = folder / INDEX_FILE
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "metadata": {"total_size": 1}, "more": []}))
    assert set(open_checkpoint(folder).entries) == set(TENSORS)
