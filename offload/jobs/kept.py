"""A job's output while it grows: parts are kept, continued after a stop, and joined."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ...io.closing import Closing
from ...io.errors import OutputError, UsageError
from ..files.durable import DurableFiles
from ..files.outputs import encoded, output_format
from ..files.parts import Cut, OutputPart, PartRecord, are_whole
from .finished import Finished, read_finished, write_manifest
from .manifest import Manifest, refusals, remarks
from .part_store import PartStore, read_manifest

_log = logging.getLogger("penstock")

Mode = Literal["resume", "restart", "retry"]
"""What to do with results that are there: go on; begin anew; go on and compute failed
rows again."""


def begun_as(output: Path, mode: Mode) -> Manifest | None:
    """The manifest of the job that made `output` or began it; None where the job begins
    now."""
    if mode == "restart":
        return None
    if (begun := read_manifest(output)) is not None:
        return begun[0]
    finished = read_finished(output)
    return None if finished is None else finished.manifest


class ResumableOutput(Closing):
    """Writes the results of the job `manifest` into the file `output`.

    Locks the output, and finds which parts are done. Raises UsageError where another
    job's results are there, OutputError where nothing can be written.
    """

    is_kept = True

    def __init__(
        self,
        output: Path,
        manifest: Manifest,
        mode: Mode,
        disk: DurableFiles | None = None,
    ) -> None:
        self._output = output
        self._format = output_format(output)
        self._disk = disk or DurableFiles()
        self._store = PartStore(output, self._disk)
        self.manifest = manifest
        self._stamps = manifest.stamps
        self.done: dict[int, PartRecord] = {}
        """The parts that are done, by number."""
        self.redo: frozenset[int] = frozenset()
        """The parts that are done but whose failed rows are computed again."""
        self.is_finished = False
        """Whether all is done."""
        self._kept: set[int] = set()
        """The parts whose results are in the folder. Others are in the old output."""
        self._old: Finished | None = None
        self._old_parts: Iterator[tuple[PartRecord, list[bytes]]] = iter(())
        try:
            self._open(manifest, mode)
        except BaseException:
            self._store.close()
            raise

    @property
    def is_input_doubtful(self) -> bool:
        """Whether the input may have changed since the job began: its files were
        written, or it is a stream."""
        return self.manifest.stamps != self._stamps or 0 in self._stamps

    @property
    def cut(self) -> Cut:
        """How rows are cut into parts, as it was when the job began."""
        return Cut(**self.manifest.cut)

    @property
    def num_rows(self) -> int:
        """The rows of the parts that are done."""
        return sum(record.num_rows for record in self.done.values())

    @property
    def num_errors(self) -> int:
        """How many rows of the parts that are done are errors."""
        return sum(record.num_errors for record in self.done.values())

    def known(self, part: OutputPart) -> OutputPart:
        """`part` with the results that need not be computed again."""
        if part.number not in self.redo:
            return part
        lines = self._lines(part.number)
        known = {i: line for i, line in enumerate(lines) if not _is_error(line)}
        return replace(part, known=known)

    def write(self, part: OutputPart, lines: Sequence[bytes], num_errors: int) -> None:
        """Keeps the results of a part. Called on one thread at a time."""
        self.done[part.number] = self._store.write(part, lines, num_errors)
        self._kept.add(part.number)

    def finish(self) -> None:
        """Joins all parts into the output. Raises OutputError where parts are missing
        or damaged."""
        records = dict(sorted(self.done.items()))
        if not are_whole(records.values()):
            raise OutputError(
                f"the parts in {self._store.folder} are not those of one job: begin "
                "anew with --restart"
            )
        self._store.publish(encoded(lambda: self._all_lines(records), *self._format))
        write_manifest(
            self._disk, self._output, replace(self.manifest, retries=False), records
        )
        self._store.finish()

    def close(self) -> None:
        """Releases the lock. Parts that are done stay; where there are none, the folder
        is removed."""
        try:
            self._store.abandon()
        finally:
            self._store.close()

    def _open(self, manifest: Manifest, mode: Mode) -> None:
        begun = None if mode == "restart" else self._store.manifest()
        finished = None if mode == "restart" else read_finished(self._output)
        if begun is not None:
            self._go_on(begun, manifest, finished, mode)
        elif finished is not None and finished.is_intact:
            self._begin_again(finished, manifest, mode)
        elif self._output.exists() and mode != "restart":
            raise UsageError(
                f"{self._output} exists, and nothing beside it says that this job made "
                "it: name another output, or write over it with --restart"
            )
        else:
            self._store.begin(manifest)

    def _go_on(
        self, begun: Manifest, now: Manifest, finished: Finished | None, mode: Mode
    ) -> None:
        """Continues a job that was begun."""
        _compare(begun, now, f"{self._store.folder} holds parts of another job")
        _announce(begun, now)
        self.manifest = begun
        kept = self._store.records()
        self._kept = set(kept)
        if begun.retries:
            if finished is None:
                raise UsageError(
                    f"{self._output} is gone, whose failed rows were being done again: "
                    "put it back, or begin anew with --restart"
                )
            self._retry(finished, frozenset(kept))
        elif mode == "retry":
            self.redo = frozenset(n for n, r in kept.items() if r.num_errors)
        self.done |= kept

    def _begin_again(self, finished: Finished, now: Manifest, mode: Mode) -> None:
        """Does nothing for a job that is finished, unless its failed rows are to be
        computed again."""
        _compare(finished.manifest, now, f"{self._output} is of another job")
        self.manifest = replace(finished.manifest, retries=True)
        self.done = dict(finished.records)
        if mode == "retry" and self.num_errors:
            _announce(finished.manifest, now)
            self._store.begin(self.manifest)
            self._retry(finished, frozenset())
        else:
            self.is_finished = True
            self._store.finish()

    def _retry(self, finished: Finished, kept: frozenset[int]) -> None:
        self._old = finished
        self._old_parts = finished.parts(kept)
        self.done = dict(finished.records)
        failed = {n for n, record in finished.records.items() if record.num_errors}
        self.redo = frozenset(failed - kept)

    def _lines(self, number: int) -> list[bytes]:
        """The results of a part that is done. For a finished output, numbers must go up
        from call to call."""
        if self._old is None:
            return self._store.lines(self.done[number])
        return next(
            lines for record, lines in self._old_parts if record.number == number
        )

    def _all_lines(self, records: Mapping[int, PartRecord]) -> Iterator[bytes]:
        old = iter(()) if self._old is None else self._old.parts(self._kept)
        for number, record in records.items():
            before = next(old, None)
            if number in self._kept or before is None:
                yield from self._store.lines(record)
            else:
                yield from before[1]


def _compare(begun: Manifest, now: Manifest, what: str) -> None:
    found = refusals(begun, now)
    if found:
        raise UsageError(
            f"{what}: {'; '.join(found)}; name another output, go on with what it was, "
            "or begin anew with --restart"
        )


def _announce(begun: Manifest, now: Manifest) -> None:
    for remark in remarks(begun, now):
        _log.warning(
            "%s since the job began: last bits of results may differ from those of one "
            "run",
            remark,
        )


def _is_error(line: bytes) -> bool:
    return "error" in json.loads(line)
