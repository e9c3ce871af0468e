"""A job may end at any instant and be gone on with: nothing lost, doubled or reordered,
and nothing that was done is done again."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import CUT, FragileDisk, Killed, Recorded, read_lines, run_job, write_rows
from penstock.io.errors import InputError, OutputError, PenstockError, UsageError
from penstock.offload.files.inputs import Inputs
from penstock.offload.files.json_rows import SCORED_KEYS
from penstock.offload.files.part_reader import check_done
from penstock.offload.files.parts import Cut
from penstock.offload.files.sources import find_files
from penstock.offload.jobs.finished import read_finished

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", 18)


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> bytes:
    run_job(source, tmp_path / "whole.jsonl")
    return (tmp_path / "whole.jsonl").read_bytes()


def refused_at(step: int, source: Path, output: Path, failure: OSError) -> str:
    """What is said when this step fails."""
    try:
        run_job(source, output, disk=FragileDisk(step, failure))
    except OutputError as error:
        return str(error)
    return ""


def killed_at(step: int, source: Path, output: Path, **options: Any) -> bool:
    """Whether the job was killed at this step (or ended before)."""
    try:
        run_job(source, output, disk=FragileDisk(step), **options)
    except Killed:
        return True
    return False


def fail_on(*numbers: int) -> Recorded:
    def make(number: int, row: Any) -> dict[str, Any]:
        if number in numbers:
            return {"id": row["id"], "error": "too exotic"}
        return {"id": row["id"], "value": number / 3}

    return Recorded(make)


@pytest.mark.slow
def test_a_job_killed_at_any_step_goes_on_to_the_same_bytes(
    source: Path, expected: bytes, tmp_path: Path
) -> None:
    step = 0
    while True:
        step += 1
        output = tmp_path / f"{step}.jsonl"
        if not killed_at(step, source, output):
            break
        assert not output.exists() or output.read_bytes() == expected
        run_job(source, output)
        assert output.read_bytes() == expected, step
        assert not output.with_name(f"{step}.jsonl.parts").exists()
    assert step > 80, "every part's lines, renames, the joining and the removal"


@pytest.mark.slow
@settings(max_examples=20)
@given(st.lists(st.integers(1, 60), max_size=8), st.integers(1, 7))
def test_however_often_it_is_killed(
    source: Path, expected: bytes, tmp_path_factory: Any, steps: list[int], rows: int
) -> None:
    output = tmp_path_factory.mktemp("out") / "out.jsonl"
    for step in steps:
        killed_at(step, source, output, cut=Cut(rows, 10_000))
    run_job(source, output, cut=Cut(5, 10_000))  # the one that it began with holds
    assert output.read_bytes() == expected


def test_what_is_done_is_not_done_again(
    source: Path, expected: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert killed_at(30, source, output)
    parts = list((tmp_path / "out.jsonl.parts").glob("part-*.jsonl"))
    assert 0 < len(parts) < 5
    asked = run_job(source, output).asked
    assert asked == list(range(4 * len(parts), 18))
    assert output.read_bytes() == expected


@pytest.mark.slow
def test_a_failing_step_is_one_error_and_loses_nothing(
    source: Path, expected: bytes, tmp_path: Path
) -> None:
    """The disk is full, or whatever else, at each step once; then there is room."""
    full = OSError(errno.ENOSPC, "No space left on device")
    counting = FragileDisk()
    run_job(source, tmp_path / "count.jsonl", disk=counting)
    for step in range(1, counting.num_steps + 1):
        output = tmp_path / f"{step}.jsonl"
        says = refused_at(step, source, output, full)
        # What only tidies up may fail in silence.
        assert not says or "No space left on device; what is done stays" in says
        run_job(source, output)
        assert output.read_bytes() == expected


def test_parts_that_fail_to_be_written_leave_no_remains(
    source: Path, tmp_path: Path
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OutputError):
        run_job(source, tmp_path / "out.jsonl", disk=FragileDisk(30, full))
    names = os.listdir(tmp_path / "out.jsonl.parts")
    assert [name for name in names if name.endswith(".new")] == []


# What may be gone on with.


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 2}, "its seed was 1 and is 2"),
        ({"seed": 1, "stop": "x"}, "its stop was None and is 'x'"),
    ],
)
def test_another_meaning_is_refused(
    change: dict[str, Any], says: str, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert killed_at(30, source, output, seed=1)
    with pytest.raises(UsageError, match=says) as caught:
        run_job(source, output, **change)
    assert "--restart" in str(caught.value)
    run_job(source, output, seed=1)
    with pytest.raises(UsageError, match=says):
        run_job(source, output, **change)
    before = output.read_bytes()
    asked = run_job(source, output, mode="restart", **change).asked
    assert asked == list(range(18))
    assert output.read_bytes() == before


def test_another_input_is_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert killed_at(30, source, output)
    write_rows(source, 19)
    with pytest.raises(UsageError, match=r"its input .*in.jsonl is another one"):
        run_job(source, output)
    other = write_rows(tmp_path / "other.jsonl", 18)
    with pytest.raises(UsageError, match=r"other.jsonl is new"):
        run_job(other, output)


def test_files_in_another_order_are_another_input(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    other = write_rows(tmp_path / "other.jsonl", 9)
    run_job([source, other], output)
    assert run_job([source, other], output).asked == []
    with pytest.raises(UsageError, match=r"its input .*in.jsonl is another one"):
        run_job([other, source], output)


def test_an_input_that_was_moved_is_the_same(
    source: Path, expected: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert killed_at(30, source, output)
    (tmp_path / "there").mkdir()
    source.rename(tmp_path / "there" / "in.jsonl")
    assert run_job(tmp_path / "there" / "in.jsonl", output).asked[0] > 0
    assert output.read_bytes() == expected


def test_an_input_that_was_copied_again_is_compared_and_taken(
    source: Path, expected: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert killed_at(30, source, output)
    source.write_bytes(source.read_bytes())
    os.utime(source, ns=(1, 1))
    asked = run_job(source, output).asked
    assert asked[0] > 0
    assert output.read_bytes() == expected


def test_rows_that_differ_where_samples_do_not_see_it_are_found(
    tmp_path: Path,
) -> None:
    """In a file of 3 MB, which is not read whole to tell it from others."""
    source = tmp_path / "in.jsonl"
    line = json.dumps({"id": "x", "text": "a" * 3_000}).encode() + b"\n"
    source.write_bytes(line * 1_000)
    output = tmp_path / "out.jsonl"
    assert killed_at(900, source, output, cut=Cut(50, 10**9))
    with source.open("r+b") as file:
        file.seek(len(line) * 25 + 100)  # between the samples, in a part that is done
        file.write(b"b")
    os.utime(source, ns=(1, 1))
    with pytest.raises(InputError, match=r"rows 1 to 50 of the input are not those"):
        run_job(source, output, cut=Cut(50, 10**9))


def test_a_finished_job_has_nothing_to_do(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run_job(source, output)
    before = output.stat().st_mtime_ns
    assert run_job(source, output).asked == []
    assert output.stat().st_mtime_ns == before
    assert sorted(os.listdir(tmp_path)) == [
        "in.jsonl",
        "out.jsonl",
        "out.jsonl.manifest.json",
    ]
    found = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert [part["num_rows"] for part in found["parts"]] == [4, 4, 4, 4, 2]
    assert found["num_rows"] == 18


def test_a_finished_job_of_standard_input_is_compared_with_what_comes_now(
    source: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"

    def piped(content: bytes, step: int | None = None) -> list[int]:
        reading, writing = os.pipe()
        os.write(writing, content)
        os.close(writing)
        monkeypatch.setattr("penstock.offload.files.inputs._STDIN", reading)
        try:
            return run_job(["-"], output, disk=FragileDisk(step)).asked
        finally:
            os.close(reading)

    content = source.read_bytes()
    with pytest.raises(Killed):
        piped(content, 30)
    assert piped(content)[0] > 0, "the parts that are done are read, and passed over"
    assert output.read_bytes() == expected
    assert piped(content) == []
    with pytest.raises(InputError, match="rows 17 to 18 of the input are not those"):
        piped(content + b'{"text": "more"}\n')
    with pytest.raises(InputError, match="rows 1 to 4 of the input are not those"):
        piped(content.replace(b"r0", b"r!"))
    assert output.read_bytes() == expected


def test_a_finished_job_whose_input_has_more_by_now_is_refused(tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", 8), tmp_path / "out.jsonl"
    run_job(source, output)
    files = find_files([write_rows(tmp_path / "more.jsonl", 9)])
    records = read_finished(output)
    assert records is not None
    with pytest.raises(InputError, match="row 9 of the input, and what follows"):
        check_done(Inputs(files, SCORED_KEYS), CUT, records.records)


def test_a_file_that_is_not_ours_is_not_written_over(
    source: Path, expected: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    with pytest.raises(UsageError, match="nothing beside it says"):
        run_job(source, output)
    assert output.read_text() == "mine\n"
    run_job(source, output, mode="restart")
    assert output.read_bytes() == expected
    output.write_text("changed\n")
    with pytest.raises(UsageError, match="nothing beside it says"):
        run_job(source, output)


def test_a_restart_keeps_the_old_output_until_the_new_one_is_whole(
    source: Path, expected: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    run_job(source, output, work=fail_on(3))
    before = output.read_bytes()
    assert killed_at(40, source, output, mode="restart")
    assert output.read_bytes() == before
    assert run_job(source, output).asked != [], "what was begun is gone on with"
    assert output.read_bytes() == expected


def test_a_damaged_part_is_named(source: Path, expected: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert killed_at(30, source, output)
    part = tmp_path / "out.jsonl.parts" / "part-00000001.jsonl"
    content = bytearray(part.read_bytes())
    content[10] ^= 1
    part.write_bytes(content)
    with pytest.raises(OutputError, match=r"part-00000001.jsonl is damaged: remove it"):
        run_job(source, output)
    part.unlink()
    assert run_job(source, output).asked == [4, 5, 6, 7]
    assert output.read_bytes() == expected


def test_a_part_cut_short_is_named(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert killed_at(30, source, output)
    part = tmp_path / "out.jsonl.parts" / "part-00000000.jsonl"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(OutputError, match=r"part-00000000.jsonl is damaged"):
        run_job(source, output)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", "{}", "\0"])
def test_a_manifest_that_is_none_is_named(
    text: str, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert killed_at(30, source, output)
    (tmp_path / "out.jsonl.parts" / "manifest.json").write_text(text)
    with pytest.raises(PenstockError, match=r"manifest\.json is damaged.*--restart"):
        run_job(source, output)


# Rows that failed.


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_a_part_that_is_no_file_is_named(
    kind: str, source: Path, tmp_path: Path
) -> None:
    """Nothing waits for a pipe, or reads what has no end."""
    output = tmp_path / "out.jsonl"
    assert killed_at(30, source, output)
    path = tmp_path / "out.jsonl.parts" / "part-00000000.jsonl"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(kind)
    with pytest.raises(OutputError, match=r"part-00000000.jsonl: it is not a regular"):
        run_job(source, output)


def test_failed_rows_of_a_finished_job_are_done_again_and_only_they(
    source: Path, expected: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    run_job(source, output, work=fail_on(2, 3, 13))
    assert sum("error" in row for row in read_lines(output)) == 3
    assert run_job(source, output).asked == [], "only when asked to"
    assert run_job(source, output, mode="retry").asked == [2, 3, 13]
    assert output.read_bytes() == expected
    assert run_job(source, output, mode="retry").asked == [], "none is left"


@pytest.mark.slow
def test_a_retry_killed_at_any_step_goes_on_to_the_same_bytes(
    source: Path, expected: bytes, tmp_path: Path
) -> None:
    step, killed = 0, True
    while killed:
        step += 1
        output = tmp_path / f"{step}.jsonl"
        run_job(source, output, work=fail_on(2, 3, 13))
        before = output.read_bytes()
        killed = killed_at(step, source, output, mode="retry")
        assert output.read_bytes() in (before, expected)
        run_job(source, output, mode="retry")
        assert output.read_bytes() == expected, step
    assert step > 40


def test_failed_rows_of_a_job_under_way_are_done_again(
    source: Path, expected: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert killed_at(30, source, output, work=fail_on(1))
    asked = run_job(source, output, mode="retry").asked
    assert asked[0] == 1
    assert asked[1] > 3
    assert output.read_bytes() == expected


def test_rows_that_fail_again_stay_errors(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run_job(source, output, work=fail_on(2, 3))
    run_job(source, output, mode="retry", work=fail_on(3))
    errors = [row["id"] for row in read_lines(output) if "error" in row]
    assert errors == ["r3"]


# One job, one lock.


def test_a_second_process_is_told_who_is_writing(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    folder = tmp_path / "out.jsonl.parts"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match=r"process 4711 is writing .*out.jsonl"):
            run_job(source, output)
        with pytest.raises(UsageError, match="4711"):
            run_job(source, output, mode="restart")
    run_job(source, output)
    assert not folder.exists()


def test_two_that_begin_at_once_do_not_both_have_the_lock(
    source: Path, tmp_path: Path
) -> None:
    """A job that opened the lock of a folder that was removed meanwhile tries again."""
    output = tmp_path / "out.jsonl"

    class Racing(FragileDisk):
        has_raced = False

        def make_folder(self, path: Path) -> None:
            super().make_folder(path)
            if not self.has_raced:
                self.has_raced = True
                run_job(source, output)  # begins, ends, removes the folder

    assert run_job(source, output, disk=Racing()).asked == []


# What stands in the folder of parts may be damaged, or be taken away.


def parts_of(output: Path) -> list[Path]:
    return sorted(output.with_name(output.name + ".parts").glob("part-*.jsonl"))


class Meddling(FragileDisk):
    """Does something to the folder of parts just before results are joined."""

    def __init__(self, meddle: Callable[[Path], object]) -> None:
        super().__init__()
        self._meddle = meddle

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        if path.name == "joined.new":
            self._meddle(path.parent)
        super().write(path, chunks)


def test_a_part_that_vanishes_before_the_end_is_an_error_and_is_done_again(
    source: Path, expected: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    disk = Meddling(lambda folder: (folder / "part-00000002.jsonl").unlink())
    with pytest.raises(OutputError, match=r"part-00000002.jsonl is gone: run again"):
        run_job(source, output, disk=disk)
    assert not output.exists()
    assert run_job(source, output).asked == [8, 9, 10, 11]
    assert output.read_bytes() == expected


def test_a_part_replaced_by_another_before_the_end_is_an_error(
    source: Path, tmp_path: Path
) -> None:
    def replace(folder: Path) -> None:
        other = (folder / "part-00000003.jsonl").read_bytes()
        (folder / "part-00000002.jsonl").write_bytes(other)

    with pytest.raises(OutputError, match=r"part-00000002.jsonl is damaged"):
        run_job(source, tmp_path / "out.jsonl", disk=Meddling(replace))


def test_a_part_copied_over_another_is_done_again(
    source: Path, expected: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert killed_at(40, source, output)
    first, second, *_ = parts_of(output)
    first.write_bytes(second.read_bytes())
    assert run_job(source, output).asked == [0, 1, 2, 3, 16, 17]
    assert output.read_bytes() == expected


def test_a_part_of_another_job_is_done_again(
    source: Path, expected: bytes, tmp_path: Path
) -> None:
    output, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    assert killed_at(30, source, output)
    assert killed_at(30, source, other, work=fail_on(1), seed=2)
    parts_of(output)[0].write_bytes(parts_of(other)[0].read_bytes())
    assert run_job(source, output).asked[:4] == [0, 1, 2, 3]
    assert output.read_bytes() == expected


def test_parts_removed_while_the_job_runs_are_one_sentence(
    source: Path, tmp_path: Path
) -> None:
    class Removing(FragileDisk):
        def sync(self, path: Path) -> None:
            if parts_of(tmp_path / "out.jsonl"):
                shutil.rmtree(tmp_path / "out.jsonl.parts", ignore_errors=True)

    with pytest.raises(OutputError, match=r"out.jsonl.parts was removed while the job"):
        run_job(source, tmp_path / "out.jsonl", disk=Removing())
    assert os.listdir(tmp_path) == ["in.jsonl"]


def flips(folder: Path, num: int) -> Iterator[tuple[Path, int, int]]:
    """(file, byte, bit): `num` of them, spread over all that stands in `folder`, with
    those of each record and of the manifest among them."""
    paths = sorted(path for path in folder.iterdir() if path.stat().st_size)
    drawn = Random(num)
    for index in range(num):
        path = paths[index % len(paths)]
        nbytes = path.stat().st_size
        record = path.read_bytes().rfind(b"\n", 0, nbytes - 1) + 1
        start = record if index // len(paths) % 2 else 0
        yield path, drawn.randrange(start, nbytes), drawn.randrange(8)


@pytest.mark.slow
@pytest.mark.parametrize("num", [40, pytest.param(200, marks=pytest.mark.whole)])
def test_a_flipped_bit_never_gives_another_output(
    num: int, source: Path, expected: bytes, tmp_path: Path
) -> None:
    """A stopped job with a flipped bit is refused, or its output is the same."""
    stopped = tmp_path / "stopped.jsonl"
    assert killed_at(40, source, stopped, work=fail_on())
    num_refused = 0
    for path, place, bit in flips(stopped.with_name("stopped.jsonl.parts"), num):
        folder = tmp_path / "flipped"
        shutil.copytree(path.parent, folder / "out.jsonl.parts")
        content = bytearray(path.read_bytes())
        content[place] ^= 1 << bit
        (folder / "out.jsonl.parts" / path.name).write_bytes(content)
        try:
            run_job(source, folder / "out.jsonl")
            assert (folder / "out.jsonl").read_bytes() == expected, (path, place, bit)
        except (OutputError, UsageError):
            num_refused += 1
            assert not (folder / "out.jsonl").exists(), (path, place, bit)
        shutil.rmtree(folder)
    assert num_refused > num / 2, "most of it is guarded"
