"""What a user can cause is one sentence: short, safe to print, with the cause below it.
What is our own mistake stays visible."""

from __future__ import annotations

import errno
import json
import pickle
import re
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pytest
import torch
from rich.console import Console
from torch import nn

import penstock
from nets import Net, make
from penstock import Policy
from penstock.io.checkpoint.header import read_header
from penstock.io.errors import (
    CheckpointError,
    MachineError,
    OutputError,
    PenstockError,
    PolicyError,
    ReadError,
    StoppedError,
    UsageError,
    readable,
)
from penstock.io.regular_file import read_json_object
from penstock.io.user_errors import about, user_errors
from penstock.offload import cli
from penstock.offload.files.parts import lazy_parts, rows_of
from penstock.offload.jobs.part_store import PartStore
from penstock.offload.monitoring.show import human_bytes, report_table
from runs import report


def test_what_a_terminal_would_obey_is_escaped() -> None:
    error = CheckpointError("a\x1b[2J\x07b\nc\u202ed\ud800e\x9bf")
    assert str(error) == r"a\x1b[2J\x07b\nc\u202ed\ud800e\x9bf"
    assert str(CheckpointError("é 日本 😀")) == "é 日本 😀"


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    said = str(UsageError("begin " + "x" * 10**7 + " end"))
    assert len(said) < 2_000
    assert said.startswith("begin xx")
    assert said.endswith("xx end")
    assert len(readable("\x1b" * 10**6)) < 2_000


def test_many_sentences_are_as_many_lines_as_can_be_read() -> None:
    said = str(PolicyError(*(f"sentence {n}: " + "x" * 90 for n in range(5_000))))
    *lines, last = said.split("\n")
    assert len(said) < 2_000
    assert len(lines) > 10
    assert last == f"... and {5_000 - len(lines)} more"


def test_errors_go_from_process_to_process() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy(lookahed=1, device=5)
    for error in (caught.value, StoppedError("stopped", 15), MachineError("a", "b")):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.exit_code) == (str(error), error.exit_code)


def test_what_a_library_raises_names_the_file_and_has_the_cause_below() -> None:
    with pytest.raises(CheckpointError) as caught, about("x.json", CheckpointError):
        json.loads("{")
    assert str(caught.value).startswith("x.json: Expecting property name")
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_mistake_of_our_own_stays_what_it_is() -> None:
    text: Any = "a"
    with pytest.raises(TypeError), about("x.json", CheckpointError):
        human_bytes(text)
    with pytest.raises(AssertionError), user_errors():
        raise AssertionError("ours")


def test_memory_and_files_are_sentences_wherever_they_fail() -> None:
    with pytest.raises(MachineError, match="memory ran out"), user_errors():
        raise MemoryError
    with pytest.raises(MachineError), about("x", UsageError):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes")
    with pytest.raises(ReadError, match=r"x\.bin: No space left"), user_errors():
        raise OSError(errno.ENOSPC, "No space left on device", "x.bin")


def test_the_command_line_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(tmp_path / "no\x1b[31m[red]\nsuch")
    monkeypatch.setattr(sys, "argv", ["penstock", "verify", name])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said.rstrip("\n").isprintable()
    assert said.startswith("penstock: error: ")


def test_a_long_file_is_refused_before_it_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="has more than"):
        read_json_object(path)


def _header(text: bytes, folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def test_two_hundred_thousand_names_one_of_them_twice(tmp_path: Path) -> None:
    """Found in one walk over them: to count each would take minutes."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = [*range(200_000), 199_999]
    text = "{" + ",".join(f'"a{n}":{entry}' for n in names) + "}"
    with pytest.raises(CheckpointError, match="'a199999' stands in it twice"):
        read_header(_header(text.encode(), tmp_path))


@pytest.mark.parametrize(
    "entry",
    [
        '{"x":"' + "A" * 5_000_000 + '"}',
        '{"dtype":"' + "F" * 5_000_000 + '","shape":[],"data_offsets":[0,0]}',
        '{"dtype":"F32","shape":[' + "1," * 99_999 + '1],"data_offsets":[0,4]}',
        '{"dtype":"F32","shape":[9223372036854775808,0],"data_offsets":[0,0]}',
    ],
)
def test_a_hostile_header_has_a_short_message(entry: str, tmp_path: Path) -> None:
    path = _header(b'{"a":' + entry.encode() + b"}", tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(path.name)) as caught:
        read_header(path)
    assert len(str(caught.value)) < 2_000


def test_a_lock_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "out.jsonl.parts"
    folder.mkdir()
    (folder / "lock").symlink_to(tmp_path / "gone" / "lock")
    from penstock.offload.files.durable import DurableFiles

    with pytest.raises((OutputError, UsageError), match="lock"):
        PartStore(tmp_path / "out.jsonl", DurableFiles())


def test_a_policy_may_be_a_dict_of_its_keys() -> None:
    assert Policy.of({"device_memory": "2MiB"}).device_memory == 2 << 20
    assert Policy.of(None) == Policy()
    for wrong in ("policy.yaml", 5, ["strict"]):
        with pytest.raises(PolicyError, match="is not a policy"):
            penstock.load("x", wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("a text", ["a text"]),
        (["a", "b"], ["a", "b"]),
        (iter(["a", {"id": 7, "text": "b"}]), ["a", "b"]),
        ({"text": "a"}, ["a"]),
        (pyarrow.table({"id": [5, 6], "text": ["a", "b"]}), ["a", "b"]),
    ],
)
def test_rows_may_be_texts_or_a_table(given: Any, texts: list[str]) -> None:
    assert [row["text"] for row in rows_of(given)] == texts


class Frame:
    """A table like those of pandas, in which missing values are NaN."""

    columns = ("text", "completion")

    def to_dict(self, how: str) -> list[dict[str, Any]]:
        assert how == "records"
        return [{"text": "a", "completion": float("nan")}]


def test_what_a_row_of_a_frame_has_not_is_not_in_the_row() -> None:
    assert list(rows_of(Frame())) == [{"text": "a"}]


def test_what_is_no_row_is_that_rows_error() -> None:
    first, second = rows_of([5, "a"])
    assert "row 0 is 5" in first["error"]
    assert second == {"id": 1, "text": "a"}


@pytest.mark.parametrize("given", [5, None, b"text", "rows.jsonl", numpy.float32(1)])
def test_what_holds_no_rows_is_refused_at_once(given: Any) -> None:
    with pytest.raises(UsageError, match="rows"):
        lazy_parts(given, 10)


class Quantised(nn.Module):
    """Keeps its weights in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int8))


class Sub(torch.Tensor):
    """Another kind of tensor, as sharded and quantised ones are."""


def _of_a_subclass() -> nn.Module:
    module: nn.Module = make(Net)
    parameter = nn.Parameter(torch.zeros(3).as_subclass(Sub))
    module.register_parameter("odd", parameter)
    return module


def _sparse() -> nn.Module:
    module = nn.Module()
    module.register_parameter(
        "odd", nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    )
    return module


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Quantised, "64 bytes are buffers"),
        (_of_a_subclass, "'odd' is a Sub, not a plain tensor"),
        (_sparse, "'odd' is a torch.sparse_coo"),
        (lambda: nn.LazyLinear(3), "'weight' has no shape yet"),
        (lambda: "a path", "not a torch.nn.Module"),
    ],
)
def test_what_cannot_be_wrapped_is_named(
    build: Callable[[], Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        penstock.wrap(build(), {"device_memory": "1MiB"})


@pytest.mark.parametrize("given", [None, "a path", 5, nn.Linear(1, 1)])
def test_what_is_not_streamed_is_named(given: Any) -> None:
    for use in (penstock.statistics, penstock.unwrap, penstock.sweep):
        with pytest.raises(PenstockError, match="not streamed"):
            use(given)


def test_what_somebody_named_is_shown_as_it_is(tmp_path: Path) -> None:
    output = Console(file=StringIO(), width=200)
    output.print(report_table(report(fallbacks=["[/x]"]), "o[/red]\x1b[2J.jsonl"))
    said = output.file.getvalue()  # type: ignore[attr-defined]
    assert r"o[/red]\x1b[2J.jsonl" in said
    assert "[/x]" in said
