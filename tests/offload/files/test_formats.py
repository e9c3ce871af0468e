"""Rows and results as CSV, as lines of text and as JSON arrays; files of other kinds,
and those that a job has written itself."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs import FragileDisk, Killed, Recorded, run_job, write_rows
from penstock.io.errors import InputError, PenstockError, UsageError
from penstock.offload.files.inputs import Inputs
from penstock.offload.files.json_rows import PROMPT_KEYS, SCORED_KEYS
from penstock.offload.files.outputs import destination
from penstock.offload.files.parts import Position
from penstock.offload.files.sources import Own, find_files

pytestmark = pytest.mark.usefixtures("no_leaks")

TEXTS = ["plain", 'a "quoted", word', "two\nlines", "ü – €", "with\r\nboth ends", " x "]


def inputs_of(path: Path, keys: Mapping[str, str] = SCORED_KEYS) -> Inputs:
    return Inputs(find_files([path]), keys)


def rows_of(path: Path, keys: Mapping[str, str] = SCORED_KEYS) -> list[dict[str, Any]]:
    return [found.row for found in inputs_of(path, keys).rows(Position())]


def write_csv(path: Path, rows: list[list[str]], **options: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows(rows)
    return path


@pytest.fixture
def texts_csv(tmp_path: Path) -> Path:
    rows = [[f"r{n}", text, "x"] for n, text in enumerate(TEXTS)]
    return write_csv(tmp_path / "in.csv", [["id", "text", "category"], *rows])


def test_a_row_of_csv_is_what_the_csv_module_reads(texts_csv: Path) -> None:
    assert rows_of(texts_csv) == [
        {"id": f"r{n}", "text": text, "category": "x"} for n, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize("name", ["in.csv", "in.csv.gz", "in.json", "in.txt"])
def test_reading_goes_on_behind_any_row(
    name: str, texts_csv: Path, tmp_path: Path
) -> None:
    path = texts_csv.with_name(name)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(texts_csv.read_bytes()))
    elif name == "in.json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    elif name == "in.txt":
        path.write_text("\n".join(f"line {n}\n" for n in range(6)))
    inputs = inputs_of(path)
    found = list(inputs.rows(Position()))
    assert len(found) == 6
    for place, row in enumerate(found):
        assert list(inputs.rows(row.end)) == found[place + 1 :]


def test_csv_columns_that_are_no_text_are_json(tmp_path: Path) -> None:
    labels, messages = '["a", "b"]', '[{"role": "user", "content": "hi"}]'
    names = ["text", "labels", "messages", "temperature", "max_tokens", "stop"]
    path = write_csv(
        tmp_path / "in.csv", [names, ["1", labels, messages, "0.5", "7", "2"]]
    )
    assert rows_of(path) == [
        {
            "id": 2,
            "text": "1",
            "labels": ["a", "b"],
            "messages": [{"role": "user", "content": "hi"}],
            "temperature": 0.5,
            "max_tokens": 7,
            "stop": "2",
        }
    ]


def test_a_field_longer_than_the_csv_modules_limit_is_read(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = write_csv(tmp_path / "in.csv", [["text"], ["a" * 300_000]])
    assert [len(row["text"]) for row in rows_of(path)] == [300_000]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"words,id\na,1\n", 'no column "text".*words, id'),
        (b"text,text\na,b\n", "two columns that are named 'text'"),
        (b'text\n"no end\nb\nc\n', r"in.csv cannot be divided into rows from line 2"),
        (b"text\ra\rb\r", "in.csv cannot be divided"),
    ],
)
def test_a_csv_file_that_is_none_is_named(
    content: bytes, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        rows_of(path)


def test_a_csv_row_that_is_none_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b"\xef\xbb\xbfid,text\n1,a,b\n2,\xff\n3,\n\n4,fine\n")
    more, bytes_, empty, fine = rows_of(path)
    assert "line 2 has 3 fields" in more["error"]
    assert "line 3 is not valid UTF-8" in bytes_["error"]
    assert 'line 4 has no "text"' in empty["error"]
    assert fine == {"id": "4", "text": "fine"}


def test_a_line_of_a_text_file_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b'\xef\xbb\xbf one \r\n\n{"text": 1}\n\xff\nlast')
    one, brace, bad, last = rows_of(path, PROMPT_KEYS)
    assert one == {"id": 1, "text": " one "}
    assert brace == {"id": 3, "text": '{"text": 1}'}
    assert "line 4 is not valid UTF-8" in bad["error"]
    assert last == {"id": 5, "text": "last"}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("num", [1, 3000])
def test_a_json_array_is_rows(num: int, indent: int | None, tmp_path: Path) -> None:
    rows = [{"id": n, "text": f"ü{n}] {{," * (n % 90)} for n in range(num)]
    path = tmp_path / "in.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=indent is None))
    assert rows_of(path) == rows


def test_elements_that_are_no_rows_are_errors_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text(' [5, {"id": 1e999, "text": "a"}, {"text": "b"}, [], "x", 12 ]')
    found = rows_of(path)
    assert ["error" in row for row in found] == [True, True, False, True, True, True]
    assert [row["id"] for row in found] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"text": "a"}, {"text"', "not an array of JSON objects"),
        ('[{"text": "a"} {"text": "b"}]', "stands where ',' should"),
        ('[{"text": "a"}', "its array has no end"),
        ("[" * 100_000, "not an array of JSON objects"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "stands behind its end"),
        ('[{"text": "a"}]' + " " * 99_999 + "x", "'x' stands behind its end"),
        ('{\n "rows": []\n}\n', "give an array, or an object a line"),
    ],
)
def test_a_json_file_that_is_neither_array_nor_lines_is_named(
    content: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "in.json"
    path.write_text(content)
    with pytest.raises(InputError, match=says):
        rows_of(path)


def test_json_lines_in_a_json_file_stay_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.json", 5)
    assert [row["id"] for row in rows_of(path)] == [f"r{n}" for n in range(5)]


def some_fail(number: int, row: Any) -> dict[str, Any]:
    if number % 4 == 0:
        return {"id": row["id"], "error": 'no, "never"'}
    return {"id": row["id"], "text": TEXTS[number % 6], "n": number, "all": [number]}


def all_well(number: int, row: Any) -> dict[str, Any]:
    return {"id": row["id"], "text": TEXTS[number % 6], "n": number, "all": [number]}


@pytest.mark.parametrize("name", ["out.csv", "out.csv.gz"])
def test_results_are_written_as_csv_and_failed_ones_done_again(
    name: str, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.jsonl", 23)
    output, whole = tmp_path / name, tmp_path / f"whole{name}"
    run_job(source, output, work=Recorded(some_fail))
    content = output.read_bytes()
    content = gzip.decompress(content) if name.endswith(".gz") else content
    first, second, *_ = csv.DictReader(content.decode().splitlines(keepends=True))
    assert first == {"id": "r0", "error": 'no, "never"', "text": "", "n": "", "all": ""}
    assert second == {"id": "r1", "error": "", "text": TEXTS[1], "n": "1", "all": "[1]"}
    run_job(source, output, mode="retry", work=Recorded(all_well))
    run_job(source, whole, work=Recorded(all_well))
    assert output.read_bytes() == whole.read_bytes()


def test_other_kinds_are_refused_by_name_both_ways(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.xlsx", 2)
    with pytest.raises(InputError, match=r"rows.xlsx is of a kind that is not read"):
        find_files([path])
    for name in ("out.xlsx", "out.txt", "out.yaml.gz"):
        with pytest.raises(UsageError, match=r"cannot be written as \."):
            destination(tmp_path / name, tmp_path / "model")
    assert find_files([write_rows(tmp_path / "rows", 2)])[0].file_format == "lines"


# What a job has written itself.


def test_an_output_among_its_inputs_is_gone_on_with_and_begun_anew(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "a.jsonl", 18)
    output = folder / "out.jsonl"
    (folder / "report.html").touch()
    (folder / "report.json").write_text("{}")
    own = Own(output, None)

    def run(**options: Any) -> list[int]:
        return run_job(folder, output, own=own, **options).asked

    with pytest.raises(Killed):
        run(disk=FragileDisk(30))
    assert 0 < run()[0] < 18
    assert run() == []
    assert run(mode="restart") == list(range(18))
    files = find_files([f"{folder}/*.json*"], own)
    assert [file.path for file in files] == [folder / "a.jsonl"]
    again = find_files([folder])
    assert [file.path for file in again] == [folder / "a.jsonl", output], "of another"


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    link, target = tmp_path / "link.jsonl", tmp_path / "there" / "out.csv"
    target.parent.mkdir()
    link.symlink_to(target)
    assert destination(link, tmp_path / "model") == target
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    with pytest.raises(PenstockError, match=r"loop\.jsonl"):
        destination(loop, tmp_path / "model")


def test_names_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the name of the output has 246 bytes"):
        destination(tmp_path / ("x" * 240 + ".jsonl"), tmp_path / "model")
    with pytest.raises(UsageError, match="File name too long"):
        destination(tmp_path / ("x" * 250 + ".jsonl"), tmp_path / "model")
    longest = os.pathconf(tmp_path, "PC_NAME_MAX") - len(".manifest.json.new")
    output = destination(tmp_path / ("x" * (longest - 6) + ".jsonl"), tmp_path)
    run_job(write_rows(tmp_path / "in.jsonl", 2), output)
    with pytest.raises(UsageError, match="is a folder"):
        destination(tmp_path, tmp_path / "model")
    with pytest.raises(InputError, match="File name too long"):
        find_files(["x" * 300 + ".jsonl"])


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_two_columns_of_one_name_are_refused(suffix: str, tmp_path: Path) -> None:
    """As in CSV. Otherwise one of them would be ignored."""
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / f"in{suffix}"
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    if suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(InputError, match="two columns that are named 'text'"):
        rows_of(path)


def test_files_of_the_model_are_not_written_over(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.jsonl").touch()
    with pytest.raises(UsageError, match="is a file of the model"):
        destination(model / "config.jsonl", model)
    assert destination(model / "scores.jsonl", model) == model / "scores.jsonl"
    (model / "config.jsonl.manifest.json").touch()
    assert destination(model / "config.jsonl", model), "a job made it"
