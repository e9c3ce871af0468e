"""The best reader is chosen by measure, remembered by drive, and replaced aloud."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from penstock.io.checkpoint.header import FileStamp
from penstock.io.errors import ReadError
from penstock.io.fallbacks import Fallbacks
from penstock.io.readers import choice
from penstock.io.readers import libaio_reader as aio
from penstock.io.readers.choice import (
    ReaderTrial,
    RememberedChoice,
    best_of,
    choose,
    drive_of,
    measure,
)
from penstock.io.readers.reader import Reader
from penstock.io.readers.threads import ThreadReader

pytestmark = pytest.mark.usefixtures("no_leaks")

MIB = 1 << 20


@pytest.fixture
def stamps(tmp_path: Path) -> dict[Path, FileStamp]:
    """A file of 256 MiB that takes no room, and a small one."""
    large, small = tmp_path / "large", tmp_path / "small"
    small.write_bytes(b"x")
    with large.open("wb") as file:
        file.truncate(256 * MIB)
    return {path: FileStamp.of(path.stat()) for path in (small, large)}


@pytest.fixture
def remembered(tmp_path: Path) -> RememberedChoice:
    return RememberedChoice(tmp_path / "cache" / "readers.json")


def makers_of(
    stamps: Mapping[Path, FileStamp], opened: list[str]
) -> dict[str, Callable[[], Reader]]:
    def maker(name: str) -> Callable[[], Reader]:
        def make() -> Reader:
            opened.append(name)
            return ThreadReader(
                stamps,
                num_threads=2,
                chunk_bytes=MIB,
                direct=True,
                fallbacks=Fallbacks(),
            )

        return make

    return {name: maker(name) for name in ("libaio", "threads", "aiofiles")}


def test_among_equals_the_one_that_costs_less_cpu_is_best() -> None:
    slow = ReaderTrial("slow", 0.9e9, 0.001)
    fast = ReaderTrial("fast", 1.01e9, 0.1)
    cheap = ReaderTrial("cheap", 0.99e9, 0.05)
    assert best_of([slow, fast, cheap]) == cheap
    assert best_of([slow, fast]) == fast
    assert best_of([slow]) == slow


def test_every_reader_is_measured_in_turns_on_other_bytes(
    stamps: dict[Path, FileStamp], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    makers = makers_of(stamps, opened)
    offsets: list[int] = []
    preadv = os.preadv

    def watched(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", watched)
    trials = measure({name: makers[name] for name in ("libaio", "threads")}, stamps)
    assert [trial.reader for trial in trials] == ["libaio", "threads"]
    assert opened == ["libaio", "threads", "threads", "libaio"]
    assert all(trial.bytes_per_second > 0 for trial in trials)
    long = [offset for offset in offsets if offset]
    assert len(long) == len(set(long))


def test_a_small_file_is_not_measured(
    stamps: dict[Path, FileStamp], remembered: RememberedChoice
) -> None:
    opened: list[str] = []
    small = {p: s for p, s in stamps.items() if p.name == "small"}
    assert choose_auto(small, remembered, opened) == ("threads", ())
    assert opened == []


def choose_auto(
    stamps: Mapping[Path, FileStamp],
    remembered: RememberedChoice,
    opened: list[str],
    *,
    asked: str = "auto",
    missing: Mapping[str, str] | None = None,
    direct: bool = True,
    settings: str = "",
) -> tuple[str, tuple[str, ...]]:
    fallbacks = Fallbacks()
    name = choose(
        asked,
        makers_of(stamps, opened),
        missing or {},
        stamps,
        direct=direct,
        settings=settings,
        remembered=remembered,
        fallbacks=fallbacks,
    )
    return name, tuple(fallbacks)


def test_a_choice_is_measured_once_for_each_drive_and_setting(
    stamps: dict[Path, FileStamp],
    remembered: RememberedChoice,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "penstock")
    opened: list[str] = []
    name, fallbacks = choose_auto(stamps, remembered, opened)
    assert name in ("libaio", "threads")
    assert fallbacks == ()
    assert len(opened) == 4
    assert any("measured" in record.message for record in caplog.records)
    assert choose_auto(stamps, remembered, opened) == (name, ())
    assert len(opened) == 4
    choose_auto(stamps, remembered, opened, settings="other")
    assert len(opened) == 8


def test_a_reader_that_was_best_but_is_gone_is_not_chosen_and_no_fallback(
    stamps: dict[Path, FileStamp],
    remembered: RememberedChoice,
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened: list[str] = []
    drive = f"{drive_of(next(iter(stamps)))}, "
    remembered.put(drive, ReaderTrial("libaio", 1e9, 0.01))
    assert choose_auto(stamps, remembered, opened)[0] == "libaio"
    name, fallbacks = choose_auto(
        stamps, remembered, opened, missing={"libaio": "not there"}
    )
    assert name == "threads"
    assert fallbacks == ()
    assert caplog.records == []
    assert opened == []


@pytest.mark.parametrize("asked", ["libaio", "gds"])
def test_what_is_missing_is_replaced_and_announced(
    asked: str,
    stamps: dict[Path, FileStamp],
    remembered: RememberedChoice,
    caplog: pytest.LogCaptureFixture,
) -> None:
    missing = {asked: "pip install it", "libaio": "pip install it"}
    name, fallbacks = choose_auto(stamps, remembered, [], asked=asked, missing=missing)
    assert name == "threads"
    assert len(fallbacks) == 1
    assert asked in fallbacks[0]
    assert "pip install it" in fallbacks[0]
    assert [record.message for record in caplog.records] == list(fallbacks)


@pytest.mark.parametrize("asked", ["libaio", "threads", "aiofiles"])
def test_what_was_asked_for_is_taken_unmeasured(
    asked: str, stamps: dict[Path, FileStamp], remembered: RememberedChoice
) -> None:
    opened: list[str] = []
    assert choose_auto(stamps, remembered, opened, asked=asked) == (asked, ())
    assert opened == []


def test_where_direct_reads_are_refused_the_cache_is_read_and_that_is_announced(
    stamps: dict[Path, FileStamp],
    remembered: RememberedChoice,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(choice, "reads_directly", lambda path: False)
    name, fallbacks = choose_auto(stamps, remembered, [])
    assert name == "aiofiles"
    assert "O_DIRECT" in fallbacks[0]
    assert [record.message for record in caplog.records] == list(fallbacks)


def test_reading_through_the_cache_on_purpose_is_no_fallback(
    stamps: dict[Path, FileStamp], remembered: RememberedChoice
) -> None:
    assert choose_auto(stamps, remembered, [], direct=False) == ("aiofiles", ())


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}', '{"x": {"reader": 1}}'])
def test_a_broken_memory_is_no_memory(
    content: str, remembered: RememberedChoice, tmp_path: Path
) -> None:
    path = tmp_path / "cache" / "readers.json"
    path.parent.mkdir()
    path.write_text(content)
    assert remembered.get("x") is None
    trial = ReaderTrial("threads", 1e9, 0.1)
    remembered.put("x", trial)
    assert remembered.get("x") == trial
    assert json.loads(path.read_text())["x"]["reader"] == "threads"
    assert os.listdir(path.parent) == [path.name]


def test_a_memory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    remembered = RememberedChoice(tmp_path / "file" / "readers.json")
    remembered.put("x", ReaderTrial("threads", 1e9, 0.1))
    assert remembered.get("x") is None


def test_a_drive_is_the_mount_that_a_file_lies_on(tmp_path: Path) -> None:
    assert drive_of(tmp_path / "x") == drive_of(tmp_path)
    assert drive_of(Path("/proc/self")).split()[1] == "proc"


def test_an_error_while_measuring_leaves_nothing_open(
    stamps: dict[Path, FileStamp], monkeypatch: pytest.MonkeyPatch
) -> None:
    makers = makers_of(stamps, [])

    def fail(*args: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ReadError, match="Input/output error"):
        measure({"threads": makers["threads"]}, stamps)


@pytest.fixture(params=["package", "library"])
def without_libaio(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> str:
    import builtins

    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "libaio" and request.param == "package":
            raise ImportError(name)
        if name == "libaio":
            raise OSError("libaio.so.1: cannot open shared object file")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    found: str = request.param
    return found


def test_a_missing_libaio_says_how_to_get_it(without_libaio: str) -> None:
    reason = aio.why_not()
    assert reason is not None
    assert {"package": "pip install libaio", "library": "apt install"}[
        without_libaio
    ] in reason
