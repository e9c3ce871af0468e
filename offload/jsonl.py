"""Rows in from a JSONL file, results out to one: in order, and never half a file under
the final name."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..io.closing import Closing
from ..io.errors import InputError, OutputError

SCORED_KEYS = {"text": '"text"', "prompt": '"prompt" and "completion"'}
PROMPT_KEYS = {"prompt": '"prompt"', "text": '"text"', "messages": '"messages"'}


def count_rows(path: Path) -> int:
    """Rows of the file `path`. Raises InputError when it cannot be read or is empty."""
    try:
        with path.open("rb") as file:
            rows = sum(1 for line in file if line.strip())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not rows:
        raise InputError(
            f'{path} is empty: it needs a JSON object a line, such as {{"text": "..."}}'
        )
    return rows


def read_rows(
    path: Path, any_of: Mapping[str, str] = SCORED_KEYS
) -> Iterator[dict[str, Any]]:
    """The rows of `path`; one without an "id" gets its line number (from 1). A line
    that is no JSON object, or has none of the keys `any_of` (and how an error names
    each), becomes a row with an "error" that names the line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _row(line, number, any_of)
    except OSError as error:
        raise InputError(f"reading {path} failed: {error.strerror}") from error


def _row(line: bytes, number: int, any_of: Mapping[str, str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return {"id": number, "error": f"line {number} is no UTF-8: {error.reason}"}
    except ValueError as error:
        return {"id": number, "error": f"line {number} is no JSON: {error}"}
    if not isinstance(row, dict):
        return {"id": number, "error": f"line {number} is no JSON object: {row!r:.40}"}
    if not any_of.keys() & row.keys():
        keys = ", ".join(key for key in row) or "none"
        wanted = ", nor ".join(any_of.values())
        row["error"] = f"line {number} has no {wanted} (keys: {keys})"
    else:
        row.pop("error", None)  # an input's own key is no failure of ours
    row.setdefault("id", number)
    return row


class ResultWriter(Closing):
    """Writes results to `path` by way of `path.partial`: the final name appears when
    all are there; what was written before a failure stays under the partial one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.num_written = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("w", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"cannot write {self.partial}: {error.strerror}"
            ) from error

    def write(self, result: Mapping[str, Any]) -> None:
        """Appends one result; on disk at once, as far as this process is concerned."""
        try:
            self._file.write(json.dumps(result, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error
        self.num_written += 1

    def finish(self) -> None:
        """All results are written: gives the file its final name."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.partial, self.path)
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Leaves the partial file as it is."""
        with contextlib.suppress(OSError):  # the failure to write was raised already
            self._file.close()

    def _failure(self, error: OSError) -> OutputError:
        return OutputError(
            f"writing {self.partial} failed: {error.strerror}; its first "
            f"{self.num_written} results are complete; make room and run again"
        )
