"""Results in every format: the same ones, and the same bytes each time."""

from __future__ import annotations

import gzip
import json
import os
import stat
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from jobs import Recorded, read_lines, run_job, write_rows
from penstock.io.errors import OutputError
from penstock.offload.files.outputs import column_kinds, results_of
from penstock.offload.files.parts import Cut
from penstock.offload.files.streamed_output import StreamedOutput, is_stream

pytestmark = pytest.mark.usefixtures("no_leaks")

NAMES = ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst", "out.parquet", "out.arrow"]


def failing(number: int, row: Any) -> dict[str, Any]:
    if number % 5 == 3:
        return {"id": row["id"], "error": "too exotic"}
    return {"id": row["id"], "logprob": -number / 3, "tokens": number, "all": [number]}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", 23)


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> list[dict[str, Any]]:
    run_job(source, tmp_path / "plain.jsonl", work=Recorded(failing))
    return read_lines(tmp_path / "plain.jsonl")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows, by the libraries' own readers, without values that are null."""
    if path.suffix == ".parquet":
        rows = pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix == ".arrow":
        rows = pyarrow.feather.read_table(path).to_pylist()
    else:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        elif path.suffix == ".zst":
            content = zstandard.ZstdDecompressor().stream_reader(content).read()
        rows = [json.loads(line) for line in content.splitlines()]
    return [{k: v for k, v in row.items() if v is not None} for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_has_the_same_results(
    name: str, source: Path, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    output, again = tmp_path / name, tmp_path / f"again-{name}"
    run_job(source, output, work=Recorded(failing))
    run_job(source, again, work=Recorded(failing))
    assert read(output) == expected
    assert output.read_bytes() == again.read_bytes()
    assert [json.loads(line) for line in results_of(output)] == expected


@pytest.mark.parametrize("name", NAMES)
def test_failed_rows_are_done_again_in_every_format(
    name: str, source: Path, tmp_path: Path
) -> None:
    output, whole = tmp_path / name, tmp_path / f"whole-{name}"
    run_job(source, output, work=Recorded(failing))
    assert len(run_job(source, output, mode="retry").asked) == 4
    kept = [row for row in read(output) if int(row["id"][1:]) % 5 != 3]
    run_job(source, whole, work=Recorded(failing))
    assert kept == [row for row in read(whole) if "error" not in row]
    assert not [row for row in read(output) if "error" in row]


def test_columns_of_mixed_values_are_written_as_json(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    rows = [{"id": identity, "text": "a"} for identity in (1, "b", [2], None)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_job(source, output)
    assert [row["id"] for row in pyarrow.parquet.read_table(output).to_pylist()] == [
        "1",
        '"b"',
        "[2]",
        "null",
    ]
    assert [json.loads(line)["id"] for line in results_of(output)] == [
        1,
        "b",
        [2],
        None,
    ]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], "int"),
        ([1, 2.5], "float"),
        (["a", None], "string"),
        ([None], "json"),
        ([[1], [2, 3]], "[int]"),
        ([["a"], []], "json"),
        ([2**70, 1], "json"),
        ([2**60, 1], "int"),
        ([[2**60], [1]], "[int]"),
        ([2**60, 0.5], "json"),
        ([0.5, 1, 2**60], "json"),
        ([True, 1], "json"),
        ([{"a": 1}], "json"),
    ],
)
def test_a_column_is_of_one_kind_or_json(values: list[Any], kind: str) -> None:
    lines = [json.dumps({"x": value}).encode() for value in values]
    assert column_kinds(lines) == {"x": kind}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("identity", ["\ud800", ["\ud800"]])
def test_half_of_a_surrogate_pair_comes_back(
    identity: Any, name: str, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / name
    rows = [{"id": each, "text": "a"} for each in (identity, "\\ud800")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_job(source, output)
    found = [json.loads(line)["id"] for line in results_of(output)]
    assert found == [identity, "\\ud800"]


def test_numbers_that_json_has_not_are_errors(source: Path, tmp_path: Path) -> None:
    """Whatever a task gives: never NaN in the output."""
    output = tmp_path / "out.jsonl"
    run_job(source, output, work=Recorded(lambda n, row: {"id": n, "x": float("nan")}))
    rows = read_lines(output)
    assert {row["error"][:24] for row in rows} == {"the result is not finite"}


# Where nothing can be written.


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_named(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OutputError, match=r"cannot write .*locked.*Permission denied"):
        run_job(source, folder / "out.jsonl")


@pytest.mark.parametrize("folder", ["/proc", "/sys"])
def test_a_file_system_that_takes_nothing_is_named(source: Path, folder: str) -> None:
    with pytest.raises(OutputError, match=rf"cannot write {folder}/out.jsonl.parts"):
        run_job(source, Path(folder) / "out.jsonl")


def test_a_full_device_is_named(source: Path) -> None:
    device = Path("/dev/full")
    assert is_stream(device)
    from penstock.offload.files.parts import OutputPart, Position

    part = OutputPart(0, 0, [{}], Position(), "")
    with (
        StreamedOutput(device, Cut(4, 100)) as streamed,
        pytest.raises(OutputError, match="No space left on device; 0 rows"),
    ):
        streamed.write(part, [b"{}\n"], 0)


def test_a_pipe_and_standard_output_are_streams(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert is_stream(tmp_path / "pipe")
    assert is_stream(Path("-"))
    assert not is_stream(tmp_path / "file")
