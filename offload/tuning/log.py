"""What a search has measured, in a file beside its output: killed at any time and run
again, the search goes on from there."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...io.errors import OutputError, UsageError
from ...io.regular_file import read_json
from ..files.durable import DurableFiles, write_whole
from .race import Timing

SUFFIX = ".measured.json"
_VERSION = 1


class TuneLog:
    """The timings of the search that writes `output`. Raises UsageError where what is
    there is another one's, OutputError where nothing can be written."""

    def __init__(
        self,
        output: Path,
        job: Mapping[str, Any],
        *,
        restart: bool,
        disk: DurableFiles | None = None,
    ) -> None:
        self.path = output.with_name(output.name + SUFFIX)
        self._job = json.loads(json.dumps(job))
        self._disk = disk or DurableFiles()
        self.timings: list[Timing] = []
        if self.path.exists() and not restart:
            self.timings = self._read()
            return
        if output.exists() and not restart:
            raise UsageError(
                f"{output} exists, and nothing beside it says that this search made "
                "it: name another output, or write over it with --restart"
            )
        self._write()  # what cannot be written is found before anything is measured

    def add(self, timing: Timing) -> None:
        """Keeps one more, on disk when this returns."""
        self.timings.append(timing)
        self._write()

    def _write(self) -> None:
        found = {
            "version": _VERSION,
            "job": self._job,
            "timings": [asdict(timing) for timing in self.timings],
        }
        write(self._disk, self.path, json.dumps(found, indent=1) + "\n")

    def _read(self) -> list[Timing]:
        fix = "begin anew with --restart"
        found = read_json(self.path, error=UsageError, fix=fix)
        try:
            version, job = found["version"], found["job"]
            timings = [_timing(values) for values in found["timings"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self.path} holds no measurements of a search ({error!r}): {fix}"
            ) from None
        others = [key for key in self._job if job.get(key) != self._job[key]]
        if version != _VERSION or others:
            raise UsageError(
                f"{self.path} holds measurements of another search: the "
                f"{', the '.join(others) or 'version'} was another; name another "
                "output, or begin anew with --restart"
            )
        return timings


def write(disk: DurableFiles, path: Path, text: str) -> None:
    """The file `path`, whole or as it was. Raises OutputError."""
    try:
        disk.make_folder(path.parent)
        write_whole(disk, path, [text.encode()])
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _timing(values: Mapping[str, Any]) -> Timing:
    settings = tuple((str(key), value) for key, value in values["settings"])
    return Timing(
        settings,
        int(values["rung"]),
        int(values["lap"]),
        None if values["rate"] is None else float(values["rate"]),
        str(values["error"]),
    )
