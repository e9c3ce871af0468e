"""A safetensors header is read as the format says, or refused with a reason."""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checkpoints import (
    SAVED_DTYPES,
    bits_of,
    entry,
    random_tensor,
    write_raw,
)
from penstock.io.checkpoint.dtypes import STORED_DTYPES
from penstock.io.checkpoint.header import FileStamp, TensorEntry, read_header
from penstock.io.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("no_leaks")


def stored_bits(entry: TensorEntry) -> bytes:
    return entry.path.read_bytes()[entry.offset : entry.offset + entry.nbytes]


def test_every_dtype_that_safetensors_knows_is_known(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"a": entry("NEW", [], 0, 0)})
    with pytest.raises(SafetensorError, match="expected one of") as caught:
        safe_open(path, "pt")
    known = re.findall(r"`(\w+)`", str(caught.value).partition("expected one of")[2])
    assert set(STORED_DTYPES) == set(known)


@pytest.mark.parametrize("name", SAVED_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0, 2), (5, 3)], ids=str)
def test_a_saved_tensor_is_found_where_it_lies(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    tensor = random_tensor(SAVED_DTYPES[name], shape)
    save_file({"before": torch.zeros(3), "it": tensor}, path)

    stamp, entries = read_header(path)

    found = {e.name: e for e in entries}["it"]
    assert (found.dtype, found.shape) == (tensor.dtype, shape)
    assert found.path == path
    assert stored_bits(found) == bytes(bits_of(tensor).tolist())
    assert stamp == FileStamp.of(path.stat())


def test_two_packed_four_bit_floats_are_one_element_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensor = random_tensor(torch.uint8, (5, 3)).view(torch.float4_e2m1fn_x2)
    save_file({"it": tensor}, path)
    _, (found,) = read_header(path)
    assert (found.dtype, found.shape) == (tensor.dtype, (5, 3))
    assert stored_bits(found) == bytes(bits_of(tensor).tolist())


def test_entries_come_in_file_order(tmp_path: Path) -> None:
    path = write_raw(
        tmp_path / "x.safetensors",
        {
            "__metadata__": {"format": "pt"},
            "last": entry("U8", [3], 2, 5),
            "empty": entry("F32", [0, 7], 2, 2),
            "first": entry("I16", [], 0, 2),
        },
        data=b"abcde",
    )
    _, entries = read_header(path)
    assert [e.name for e in entries] == ["first", "empty", "last"]
    assert [stored_bits(e) for e in entries] == [b"ab", b"", b"cde"]


def test_a_file_without_tensors_is_sound(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", {})
    assert read_header(path)[1] == ()


@dataclass(frozen=True)
class Lie:
    id: str
    header: dict[str, Any] | bytes
    says: str
    data: bytes = field(default=bytes(8))


F32 = entry("F32", [2], 0, 8)
LIES = [
    Lie("length_contradicts_shape", {"a": entry("F32", [3], 0, 8)}, "takes 12 bytes"),
    Lie("length_contradicts_dtype", {"a": entry("BF16", [2], 0, 8)}, "takes 4 bytes"),
    Lie("half_a_byte", {"a": entry("F4", [17], 0, 8)}, "takes 8.5 bytes"),
    Lie("half_an_element", {"a": entry("F4", [2, 1, 1], 0, 1)}, "odd row", bytes(1)),
    Lie("packed_scalar", {"a": entry("F4", [], 0, 0)}, "takes 0.5 bytes", b""),
    Lie("overlap", {"a": F32, "b": entry("U8", [4], 4, 8)}, "'b' overlap the one"),
    Lie("same_place", {"a": F32, "b": F32}, "overlap the one before it"),
    Lie("gap", {"a": entry("U8", [6], 2, 8)}, "2 bytes before tensor 'a'"),
    Lie(
        "gap_between",
        {"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 6, 8)},
        "4 bytes before tensor 'b'",
    ),
    Lie("out_of_the_file", {"a": entry("F32", [4], 0, 16)}, "is truncated"),
    Lie("truncated", {"a": F32}, "is truncated", bytes(7)),
    Lie("trailing_bytes", {"a": F32}, "has 3 bytes after its last", bytes(11)),
    Lie("only_trailing_bytes", {}, "has 8 bytes after its last"),
    Lie("negative_start", {"a": entry("U8", [12], -4, 8)}, "malformed"),
    Lie("reversed", {"a": entry("U8", [8], 8, 0)}, "hold -8"),
    Lie("negative_size", {"a": entry("F32", [-1, -2], 0, 8)}, "malformed"),
    Lie("boolean_offset", {"a": entry("U8", [1], False, True)}, "malformed"),
    Lie("boolean_size", {"a": entry("U8", [True], 0, 1)}, "malformed"),
    Lie("float_offset", {"a": entry("F32", [2], 0.0, 8.0)}, "malformed"),
    Lie("float_size", {"a": entry("F32", [2.0], 0, 8)}, "malformed"),
    Lie("text_offset", {"a": entry("F32", [2], "0", "8")}, "malformed"),
    Lie("text_shape", {"a": entry("F64", "", 0, 8)}, "malformed"),
    Lie("object_shape", {"a": entry("F64", {}, 0, 8)}, "malformed"),
    Lie("no_shape", {"a": {"dtype": "F64", "data_offsets": [0, 8]}}, "malformed"),
    Lie("no_dtype", {"a": {"shape": [], "data_offsets": [0, 8]}}, "malformed"),
    Lie("no_offsets", {"a": {"dtype": "F64", "shape": []}}, "malformed"),
    Lie("list_dtype", {"a": entry(["F64"], [], 0, 8)}, "malformed"),
    Lie("object_dtype", {"a": entry({}, [], 0, 8)}, "malformed"),
    Lie(
        "three_offsets",
        {"a": {"dtype": "F64", "shape": [], "data_offsets": [0, 4, 8]}},
        "malformed",
    ),
    Lie("entry_is_a_list", {"a": [1, 2, 3]}, "malformed"),
    Lie("entry_is_nothing", {"a": None}, "malformed"),
    Lie("unknown_dtype", {"a": entry("F128", [], 0, 8)}, "no dtype F128"),
    Lie("lower_case_dtype", {"a": entry("f64", [], 0, 8)}, "no dtype f64"),
    Lie("six_bits", {"a": entry("F6_E2M3", [4], 0, 3)}, "no dtype F6_E2M3", bytes(3)),
    Lie("six_bits_more", {"a": entry("F6_E3M2", [4], 0, 3)}, "F6_E3M2", bytes(3)),
    Lie("huge_shape", {"a": entry("U8", [2**62, 2**62], 0, 8)}, "takes 2.1"),
    Lie("a_list", b"[1, 2]", "not a JSON object"),
    Lie("a_number", b"17", "not a JSON object"),
    Lie("not_json", b'{"a": ', "not valid JSON"),
    Lie("empty", b"", "not valid JSON"),
    Lie("no_text", b"\xff\xfe\xfd\xfc\x80", "not valid JSON"),
    Lie("nested_too_deep", b'{"a":' + b"[" * 200_000, "not valid JSON"),
    Lie("number_too_long", b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
    Lie(
        "one_name_twice",
        b'{"a":{"dtype":"F64","shape":[],"data_offsets":[0,8]},'
        b'"a":{"dtype":"I64","shape":[],"data_offsets":[0,8]}}',
        "'a' stands in it twice",
    ),
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.id)
def test_a_header_that_lies_is_refused(lie: Lie, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", lie.header, data=lie.data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message
    assert lie.says in message
    assert "again" in message, "says what to do"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"1234567", id="shorter_than_a_length"),
        pytest.param(b"\xff" * 8, id="endless_header"),
        pytest.param((101).to_bytes(8, "little") + b" " * 100, id="one_byte_short"),
        pytest.param(b"\x80\x02}q\x00." + bytes(100), id="pickle"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="download, copy or save it again") as e:
        read_header(path)
    assert str(path) in str(e.value)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little"))
    os.truncate(path, 2**40 + 8)  # sparse: takes no room
    with pytest.raises(CheckpointError, match="header has 1099511627776 bytes"):
        read_header(path)


def test_a_git_lfs_pointer_says_how_to_get_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_header(path)


@pytest.mark.parametrize("kind", ["absent", "folder"])
def test_what_cannot_be_opened_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if kind == "folder":
        path.mkdir()
    with pytest.raises(CheckpointError, match="cannot read") as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def _sound_file() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": entry("F32", [2, 3], 0, 24),
        "b": entry("BF16", [], 24, 26),
        "c": entry("U8", [0], 26, 26),
        "d": entry("I8", [6], 26, 32),
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(range(32))


SOUND = _sound_file()


@given(
    at=st.integers(0, len(SOUND)),
    removed=st.integers(0, 4),
    inserted=st.binary(max_size=4) | st.sampled_from([b"[", b"}", b'"', b"-", b"9"]),
    cut=st.none() | st.integers(0, len(SOUND)),
)
@example(at=0, removed=0, inserted=b"", cut=None)
def test_a_damaged_file_is_refused_or_read_as_safetensors_reads_it(
    at: int, removed: int, inserted: bytes, cut: int | None
) -> None:
    damaged = (SOUND[:at] + inserted + SOUND[at + removed :])[:cut]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(damaged)
        try:
            _, entries = read_header(path)
        except CheckpointError:
            assert damaged != SOUND
            return
        size = path.stat().st_size
        assert all(8 <= e.offset <= e.offset + e.nbytes <= size for e in entries)
        try:
            with safe_open(path, "pt") as file:
                names = set(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError:
            return  # it is stricter about what we do not need: metadata, for one
        assert {e.name for e in entries} == names
        for e in entries:
            tensor = tensors[e.name]
            assert (e.dtype, e.shape) == (tensor.dtype, tuple(tensor.shape))
            assert stored_bits(e) == bytes(bits_of(tensor).tolist())
