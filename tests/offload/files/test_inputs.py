"""Rows from files of every format: the same rows, in order, from any place on; and
files that are not what they seem."""

from __future__ import annotations

import builtins
import gzip
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from jobs import read_lines, run_job, write_rows
from penstock.io.errors import InputError, UsageError
from penstock.offload.files import extras
from penstock.offload.files.compression import decompressed
from penstock.offload.files.inputs import Inputs
from penstock.offload.files.json_rows import SCORED_KEYS, line_of
from penstock.offload.files.part_reader import read_parts
from penstock.offload.files.parts import Cut, Position
from penstock.offload.files.sources import check_apart, find_files
from penstock.offload.jobs.ahead import Ahead

pytestmark = pytest.mark.usefixtures("no_leaks")

ROWS: list[dict[str, Any]] = [
    {"id": n, "text": f"Zeile {n} – ü" * (n % 5)} for n in range(50)
]


def plain(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def gzipped(path: Path) -> Path:
    lines = plain(path).read_bytes().splitlines(keepends=True)
    members = [b"".join(lines[:20]), b"".join(lines[20:])]
    path.write_bytes(b"".join(gzip.compress(member) for member in members))
    return path


def zstandard_frames(path: Path) -> Path:
    lines = plain(path).read_bytes().splitlines(keepends=True)
    frames = [b"".join(lines[:20]), b"".join(lines[20:])]
    path.write_bytes(b"".join(zstandard.compress(frame) for frame in frames))
    return path


def table() -> Any:
    return pyarrow.Table.from_pylist([{**row, "image": b"\xff" * 100} for row in ROWS])


def parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(table(), path, row_group_size=7)
    return path


def feather(path: Path) -> Path:
    pyarrow.feather.write_feather(table(), path, chunksize=9)
    return path


def arrow_stream(path: Path) -> Path:
    with pyarrow.ipc.new_stream(path, table().schema) as writer:
        writer.write_table(table(), 9)
    return path


def array(path: Path) -> Path:
    path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {
    "rows.jsonl": plain,
    "rows.json": array,
    "rows.jsonl.gz": gzipped,
    "rows.ndjson.zst": zstandard_frames,
    "rows.parquet": parquet,
    "rows.feather": feather,
    "rows.arrow": arrow_stream,
}


@pytest.fixture(params=FORMATS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FORMATS[request.param](tmp_path / request.param)


def inputs_of(*sources: Path | str) -> Inputs:
    return Inputs(find_files(sources), SCORED_KEYS)


def test_every_format_has_the_same_rows(file: Path) -> None:
    inputs = inputs_of(file)
    assert [row.row for row in inputs.rows(Position())] == ROWS
    assert [row.end.row for row in inputs.rows(Position())] == list(range(1, 51))


@pytest.mark.parametrize("place", [0, 1, 19, 20, 21, 49])
def test_reading_goes_on_from_where_any_row_ended(file: Path, place: int) -> None:
    inputs = inputs_of(file)
    found = list(inputs.rows(Position()))
    rest = list(inputs.rows(found[place].end))
    assert rest == found[place + 1 :]


def test_parts_are_cut_alike_and_skipped_ones_are_not_missed(file: Path) -> None:
    inputs = inputs_of(file)
    whole = list(read_parts(inputs, Cut(8, 200), {}, is_checked=False))
    assert [row for part in whole for row in part.rows] == ROWS
    assert len(whole) > 7
    assert inputs.estimated_rows() == 50
    assert [part.first_row for part in whole] == [
        sum(len(part.rows) for part in whole[:n]) for n in range(len(whole))
    ]


def test_a_job_of_any_format_is_gone_on_with(file: Path, tmp_path: Path) -> None:
    expected = run_job(file, tmp_path / "whole.jsonl")
    assert expected.asked == list(range(50))
    found = read_lines(tmp_path / "whole.jsonl")
    assert [row["id"] for row in found] == list(range(50))


def test_several_files_of_several_formats_come_in_order(tmp_path: Path) -> None:
    for name, write in FORMATS.items():
        write(tmp_path / name)
    (tmp_path / "deep").mkdir()
    plain(tmp_path / "deep" / "more.jsonl")
    (tmp_path / "notes.md").write_text("no rows")
    (tmp_path / ".hidden.jsonl").write_text("no rows")
    (tmp_path / "_temporary").mkdir()
    plain(tmp_path / "_temporary" / "rows.jsonl")
    names = sorted([*FORMATS, "deep/more.jsonl"])
    files = find_files([tmp_path])
    assert [file.path for file in files] == [tmp_path / name for name in names]
    inputs = Inputs(files, SCORED_KEYS)
    assert [row.row for row in inputs.rows(Position())] == ROWS * len(names)
    globbed = find_files([f"{tmp_path}/rows.*"])
    assert [file.path for file in globbed] == [tmp_path / n for n in sorted(FORMATS)]
    both = find_files([tmp_path / "rows.parquet", f"{tmp_path}/*.jsonl"])
    assert [file.path for file in both] == [
        tmp_path / "rows.parquet",
        tmp_path / "rows.jsonl",
    ]


def test_rows_without_an_id_get_where_they_stood(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"text": "a"}\n\n{"text": "b"}')
    two.write_text('{"text": "c"}\nbroken\n')
    assert [r.row["id"] for r in inputs_of(one).rows(Position())] == [1, 3]
    *ids, bad = [r.row for r in inputs_of(one, two).rows(Position())]
    assert [row["id"] for row in ids] == [f"{one}:1", f"{one}:3", f"{two}:1"]
    assert bad["id"] == f"{two}:2"
    assert f"{two}:2 is not valid JSON" in bad["error"]


def test_the_same_id_twice_is_no_mistake(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": 1, "text": "a"}\n' * 9)
    run_job(source, output)
    assert [row["id"] for row in read_lines(output)] == [1] * 9


# Rows and files that are not what they seem.


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "\xff\xfe"}', "line 1 is not valid UTF-8"),
        (b"{broken", "line 1 is not valid JSON"),
        (b'{"id": NaN, "text": "a"}', "NaN is not a JSON number"),
        (b"[" * 100_000, "line 1 is not valid JSON"),
        (b'"text"', "is not a JSON object"),
        (b'{"wrong": 1}', 'has no "text"'),
    ],
)
def test_a_line_that_is_no_row_is_an_error_of_its_own(
    line: bytes, says: str, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(line + b'\n{"id": 2, "text": "fine"}\n')
    bad, fine = (found.row for found in inputs_of(source).rows(Position()))
    assert says in bad["error"]
    assert fine == {"id": 2, "text": "fine"}
    assert json.loads(line_of(bad))["error"]


def test_a_row_of_ten_megabytes_is_a_row(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    text = "word " * 2_000_000
    rows = [{"id": 0, "text": "a"}, {"id": 1, "text": text}, {"id": 2, "text": "b"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [found.row for found in inputs_of(source).rows(Position())] == rows
    assert run_job(source, output).asked == [0, 1, 2]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.ndjson.zst"])
@pytest.mark.parametrize("left", [0.3, 0.9])
def test_a_compressed_file_that_is_cut_off_is_named(
    name: str, left: float, tmp_path: Path
) -> None:
    path = FORMATS[name](tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * left)])
    inputs = inputs_of(path)
    with pytest.raises(InputError, match=rf"{name} is cut off"):
        list(inputs.rows(Position()))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.ndjson.zst"])
def test_a_compressed_file_that_is_damaged_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"no compression at all")
    with pytest.raises(InputError, match=rf"{name} is damaged"):
        list(inputs_of(path).rows(Position()))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.feather", "rows.arrow"])
def test_a_file_of_columns_that_is_damaged_is_named(name: str, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path / name)
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + b"\0" * 40)
    with pytest.raises(InputError, match=f"cannot read .*{name}"):
        inputs_of(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"cannot read .*{name}"):
        list(inputs_of(path).rows(Position()))


def test_damage_inside_of_a_parquet_file_is_found_where_it_is(tmp_path: Path) -> None:
    path = parquet(tmp_path / "rows.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*rows.parquet"):
        list(inputs_of(path).rows(Position()))


def test_a_file_without_the_columns_is_refused_before_anything_runs(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "words": ["a"]}), path)
    with pytest.raises(InputError, match=r'no column "text".*columns: id, words'):
        inputs_of(path)


def test_ids_that_json_has_not_become_strings(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    days = pyarrow.array([0, 1], pyarrow.date32())
    made = pyarrow.table({"id": days, "text": ["a", None]})
    pyarrow.parquet.write_table(made, path)
    fine, bad = (row.row for row in inputs_of(path).rows(Position()))
    assert fine == {"id": "1970-01-01", "text": "a"}
    assert 'row 2 has no "text"' in bad["error"]


def test_a_file_that_grows_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 3_000)
    rows = inputs_of(source).rows(Position())
    next(rows)
    with source.open("a") as file:
        file.write('{"text": "late"}\n')
    with pytest.raises(InputError, match=r"in.jsonl was changed while it was read"):
        list(rows)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_file_that_is_another_one_by_the_time_it_is_read_is_noticed(
    name: str, tmp_path: Path
) -> None:
    source = FORMATS[name](tmp_path / name)
    inputs = inputs_of(source)
    os.utime(source, ns=(1, 1))
    with pytest.raises(InputError, match=rf"{name} was changed while it was read"):
        list(inputs.rows(Position()))


def test_a_file_that_is_removed_while_it_is_read_is_read_to_its_end(
    tmp_path: Path,
) -> None:
    source = write_rows(tmp_path / "in.jsonl", 3_000)
    rows = inputs_of(source).rows(Position())
    next(rows)
    source.unlink()
    assert len(list(rows)) == 2_999


def test_a_later_file_that_is_gone_is_named(tmp_path: Path) -> None:
    one, two = (write_rows(tmp_path / f"{n}.jsonl", 5) for n in "ab")
    output = tmp_path / "out.jsonl"
    inputs = inputs_of(one, two)
    two.unlink()
    with pytest.raises(InputError, match=r"cannot read .*b.jsonl"):
        list(inputs.rows(Position()))
    write_rows(two, 5)
    assert run_job([one, two], output).asked == list(range(10))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nowhere.jsonl"):
        find_files([tmp_path / "nowhere.jsonl"])
    with pytest.raises(InputError, match=r"\*.jsonl has no file of rows"):
        find_files([f"{tmp_path}/*.jsonl"])
    with pytest.raises(InputError, match="has no file of rows"):
        find_files([tmp_path])
    plain(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="cannot be mixed"):
        find_files(["-", tmp_path / "a.jsonl"])
    with pytest.raises(InputError, match=r"write it without \.gz"):
        find_files([plain(tmp_path / "a.parquet.gz")])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe is not a file: .* standard input"):
        find_files([tmp_path / "pipe"])
    with pytest.raises(InputError, match="an input and the output"):
        check_apart(tmp_path / "a.jsonl", find_files([tmp_path / "a.jsonl"]))


@pytest.mark.parametrize(
    ("name", "package"), [("rows.parquet", "pyarrow"), ("rows.ndjson.zst", "zstandard")]
)
def test_a_missing_package_is_named(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = FORMATS[name](tmp_path / name)

    def missing(module: str) -> Any:
        raise builtins.ImportError(module)

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(UsageError, match=rf"{name} needs .*pip install {package}"):
        list(inputs_of(path).rows(Position()))


def test_standard_input_is_read_as_it_comes_and_from_any_row_on() -> None:
    def piped(start: Position) -> list[Any]:
        reading, writing = os.pipe()
        os.write(writing, b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}')
        os.close(writing)
        inputs = Inputs(find_files(["-"]), SCORED_KEYS, stdin=reading)
        found = list(inputs.rows(start))
        os.close(reading)
        assert inputs.estimated_rows() is None
        assert inputs.is_stream
        return found

    whole = piped(Position())
    assert [row.row["text"] for row in whole] == ["a", "b", "c"]
    assert piped(whole[0].end) == whole[1:]


# Ahead of who needs them.


def test_items_come_in_order_and_are_not_far_ahead() -> None:
    made = []
    waits = threading.Event()

    def items() -> Any:
        for number in range(10):
            made.append(number)
            if number == 3:
                waits.set()
            yield number

    with Ahead(items(), num=3, name="penstock-test") as ahead:
        assert next(ahead) == 0
        assert waits.wait(10)
        assert len(made) <= 5
        assert list(ahead) == list(range(1, 10))
        assert ahead.is_done


def test_an_error_comes_where_the_item_would_have() -> None:
    def items() -> Any:
        yield 1
        raise InputError("broken")

    with Ahead(items(), num=2, name="penstock-test") as ahead:
        assert next(ahead) == 1
        with pytest.raises(InputError, match="broken"):
            next(ahead)
        assert list(ahead) == []


def test_who_waits_for_an_item_can_be_told_that_none_comes() -> None:
    """A signal handler does so while nothing comes from standard input."""
    begun, end = threading.Event(), threading.Event()

    def items() -> Any:
        begun.set()
        end.wait(10)
        yield 1

    with Ahead(items(), num=2, name="penstock-test") as ahead:
        begun.wait(10)
        stopper = threading.Thread(target=ahead.stop)
        stopper.start()
        assert list(ahead) == []
        assert not ahead.is_done
        stopper.join()
        end.set()


def test_a_generator_is_closed_by_the_thread_that_ran_it() -> None:
    closed_by = []

    def items() -> Any:
        try:
            while True:
                yield 1
        finally:
            closed_by.append(threading.current_thread().name)

    with Ahead(items(), num=2, name="penstock-test") as ahead:
        next(ahead)
    assert closed_by == ["penstock-test"]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_what_a_few_bytes_expand_to_comes_in_pieces(kind: str) -> None:
    """Eighty kilobytes of zstd may hold gigabytes: a piece is what is in memory."""
    zeros = bytes(64 << 20)
    made = gzip.compress(zeros, 1) if kind == "gz" else zstandard.compress(zeros)
    pieces = [len(piece) for piece in decompressed([made], kind, "rows")]  # type: ignore[arg-type]
    assert sum(pieces) == len(zeros)
    assert max(pieces) <= 33 << 20


def test_a_zstd_frame_that_needs_a_huge_window_is_refused() -> None:
    wide = zstandard.ZstdCompressionParameters(
        window_log=28, enable_ldm=True, write_content_size=False
    )
    maker = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    made = maker.compress(b"x" * 100) + maker.flush()
    with pytest.raises(InputError, match="rows is damaged"):
        list(decompressed([made], "zst", "rows"))
