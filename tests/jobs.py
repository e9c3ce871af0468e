"""Jobs without a model: rows in, results that depend on nothing else, kept in parts;
and a disk that fails, or at which the process ends, at any step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.offload.files.durable import DurableFiles
from penstock.offload.files.inputs import Inputs
from penstock.offload.files.json_rows import SCORED_KEYS
from penstock.offload.files.part_reader import check_done, read_parts
from penstock.offload.files.parts import Cut, NumberedRows
from penstock.offload.files.sources import Own, find_files
from penstock.offload.jobs.kept import Mode, ResumableOutput
from penstock.offload.jobs.manifest import Manifest
from penstock.offload.jobs.running import PartsRun

CUT = Cut(4, 1000)
Make = Callable[[int, Mapping[str, Any]], dict[str, Any]]


class Killed(BaseException):
    """Plays kill -9: nothing reaches the disk any more."""


class FragileDisk(DurableFiles):
    """Counts steps. At step `last` the process ends in the middle of it, and what
    comes later has no effect; or, with an `error`, that step fails."""

    def __init__(self, last: int | None = None, error: OSError | None = None) -> None:
        self.num_steps = 0
        self._last = last
        self._error = error

    def make_folder(self, path: Path) -> None:
        self._step()
        super().make_folder(path)

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Durability is nothing that a test can see: it is not waited for."""
        self._step()
        with path.open("wb", buffering=0) as file:
            for chunk in chunks:
                file.write(chunk[: len(chunk) // 2])
                self._step()
                file.write(chunk[len(chunk) // 2 :])

    def sync(self, path: Path) -> None:
        self._step()

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self._step()
        super().remove(path)

    def remove_folder(self, path: Path) -> None:
        self._step()
        super().remove_folder(path)

    def _step(self) -> None:
        self.num_steps += 1
        if self._last is None or self.num_steps < self._last:
            return
        if self._error is None:
            raise Killed
        if self.num_steps == self._last:
            raise self._error


@dataclass
class Recorded:
    """A job's results, made of its rows by `make`; which rows were asked for."""

    make: Make = lambda number, row: {"id": row["id"], "value": number / 3}
    asked: list[int] = field(default_factory=list)

    def results(self, parts: Iterator[NumberedRows]) -> Iterator[dict[str, Any]]:
        for part in parts:
            for number, row in part:
                self.asked.append(number)
                if "error" in row:
                    yield {"id": row["id"], "error": row["error"]}
                else:
                    yield self.make(number, row)


def manifest_of(inputs: Inputs, cut: Cut = CUT, **meaning: Any) -> Manifest:
    return Manifest(
        input=inputs.identity(),
        model={"model.safetensors": "0123"},
        meaning=meaning,
        rounding={},
        versions={},
        cut={"num_rows": cut.num_rows, "num_bytes": cut.num_bytes},
        stamps=inputs.stamps(),
    )


def run_job(
    sources: Path | Sequence[Path | str],
    output: Path,
    *,
    mode: Mode = "resume",
    disk: DurableFiles | None = None,
    work: Recorded | None = None,
    cut: Cut = CUT,
    own: Own | None = None,
    **meaning: Any,
) -> Recorded:
    """Runs a job as `Job` does. Returns its work, which recorded the rows."""
    work = work or Recorded()
    paths = [sources] if isinstance(sources, Path) else sources
    files = find_files(paths, own or Own())
    inputs = Inputs(files, SCORED_KEYS)
    manifest = manifest_of(inputs, cut, **meaning)
    with ResumableOutput(output, manifest, mode, disk or FragileDisk()) as kept:
        if kept.is_finished:
            if kept.is_input_doubtful:
                check_done(inputs, kept.cut, kept.done)
            return work
        parts = read_parts(
            inputs,
            kept.cut,
            dict(kept.done),
            kept.redo,
            is_checked=kept.is_input_doubtful,
        )
        with PartsRun(parts, kept) as run:
            for result in work.results(run.feed()):
                run.take(result)
            run.finish()
        if run.failure is not None:
            raise run.failure
        kept.finish()
    return work


def write_rows(path: Path, num_rows: int, **extra: Any) -> Path:
    rows = [
        {"id": f"r{n}", "text": "word " * (n % 7), **extra} for n in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]
