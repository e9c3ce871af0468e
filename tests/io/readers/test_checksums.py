"""A flipped bit is found and named; what was summed once is not summed anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from typer.testing import CliRunner

from conftest import TinyCheckpoint
from penstock.io.checkpoint.index import open_checkpoint
from penstock.io.errors import CheckpointError, OutputError
from penstock.io.fallbacks import Fallbacks
from penstock.io.readers import checksums as module
from penstock.io.readers.checksums import (
    SIDE_FILE,
    checksums,
    differences,
    read_side_file,
    write_side_file,
)
from penstock.io.readers.threads import ThreadReader
from penstock.offload.cli import app

pytestmark = pytest.mark.usefixtures("no_leaks")

TENSORS = {
    "a": (torch.bfloat16, (300, 70)),
    "empty": (torch.float32, (0, 3)),
    "b": (torch.uint8, (5001,)),
    "scalar": (torch.float32, ()),
    "c": (torch.float64, (77, 13)),
}


def summed(folder: Path) -> dict[str, str]:
    checkpoint = open_checkpoint(folder)
    seen: list[tuple[int, int]] = []
    with ThreadReader(
        checkpoint.stamps,
        num_threads=2,
        chunk_bytes=4096,
        direct=True,
        fallbacks=Fallbacks(),
    ) as reader:
        found = checksums(checkpoint, reader, lambda *state: seen.append(state))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert all(total == checkpoint.num_bytes for _, total in seen)
    assert seen[-1][0] == checkpoint.num_bytes
    return found


@pytest.mark.parametrize("buffer_bytes", [4096, 10_000, 1 << 20])
def test_a_checksum_is_that_of_the_tensors_bytes(
    buffer_bytes: int, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUFFER_BYTES", buffer_bytes)
    folder = tiny_checkpoint(TENSORS, num_shards=3)
    expected = {
        name: xxhash.xxh3_64_hexdigest(
            tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        )
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    assert summed(folder) == expected


def test_what_differs_is_named() -> None:
    assert differences({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == []
    said = differences({"a": "1", "b": "2"}, {"a": "3", "c": "2"})
    assert [line.split("'")[1] for line in said] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"algorithm": "md5", "tensors": {}}']
)
def test_a_file_that_is_no_side_file_says_so(text: str, tmp_path: Path) -> None:
    path = tmp_path / SIDE_FILE
    path.write_text(text)
    with pytest.raises(CheckpointError, match="delete it"):
        read_side_file(path)


def test_a_side_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="writable"):
        write_side_file(tmp_path / "gone" / SIDE_FILE, {})


def test_the_command_writes_checks_and_finds_a_flipped_bit(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    folder = tiny_checkpoint(TENSORS)
    run = CliRunner().invoke
    first = run(app, ["verify", str(folder), "--checksums"])
    assert first.exit_code == 0, first.output
    assert "wrote" in first.output
    known = json.loads((folder / SIDE_FILE).read_text())
    assert set(known["tensors"]) == set(TENSORS)
    second = run(app, ["verify", str(folder), "--checksums"])
    assert second.exit_code == 0
    assert "as they were" in second.output

    entry = open_checkpoint(folder).entries["b"]
    with entry.path.open("r+b") as file:
        file.seek(entry.offset + 4999)
        byte = file.read(1)[0]
        file.seek(entry.offset + 4999)
        file.write(bytes([byte ^ 16]))
    third = run(app, ["verify", str(folder), "--checksums"])
    assert third.exit_code == 1
    assert "'b'" in third.output
    assert "'a'" not in third.output
    assert json.loads((folder / SIDE_FILE).read_text()) == known
