"""The folder that holds a job's results until it is done.

`OUTPUT.parts` holds `lock`, `manifest.json` (what job this is) and a file for each part
that is done: its results, one JSON object a line, and its record as the last line. The
record says which job and which rows the part belongs to, and holds a checksum of the
results and one of itself. Each file appears as a whole, by a rename, so there is no
list of them to keep in step. A folder without a manifest holds nothing.
"""

import fcntl
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import xxhash

from ...io.closing import Closing
from ...io.errors import OutputError, UsageError
from ...io.regular_file import MAX_INDEX_BYTES, open_regular, read_whole
from ..files.durable import (
    DurableFiles,
    put_in_place,
    sealed,
    unsealed,
    write_whole,
)
from ..files.parts import OutputPart, PartRecord
from ..files.sources import PARTS_SUFFIX
from .manifest import Manifest

_log = logging.getLogger("penstock")
_LOCK, _MANIFEST, _JOINED = "lock", "manifest.json", "joined"
_NAME = "part-{:08}.jsonl"
_NUMBER = re.compile(r"part-(\d{8,})\.jsonl")
_MOST_RECORD_BYTES = 4096
_BEGIN_ANEW = "begin anew with --restart"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError in the block into an OutputError that says how to go on."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; what is done stays: make room, or "
            "make it writable, and run again to go on"
        ) from error


def parts_folder(output: Path) -> Path:
    """The folder that holds the parts of `output` until all are done."""
    return output.with_name(output.name + PARTS_SUFFIX)


def read_manifest(output: Path) -> tuple[Manifest, str] | None:
    """The manifest, and its digest, of the job that was begun for `output`; None
    without one. Raises OutputError where it is damaged."""
    path = parts_folder(output) / _MANIFEST
    if not path.exists():
        return None
    text = read_whole(path, MAX_INDEX_BYTES, error=OutputError)
    try:
        return Manifest.from_json(unsealed(text)), _digest(text)
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path} is damaged, or of another version of Penstock ({error}): finish "
            "the job with the version that began it, or begin anew with --restart"
        ) from error


class PartStore(Closing):
    """The parts of the job that writes `output`, locked for this process until closed.
    Raises OutputError where nothing can be written, UsageError where another process
    has the lock."""

    def __init__(self, output: Path, disk: DurableFiles) -> None:
        self.output = output
        self.folder = parts_folder(output)
        self._disk = disk
        with writing(self.folder):
            self._lock: IO[str] | None = self._locked()
        self._has_begun = (self.folder / _MANIFEST).exists()
        self._job = ""
        """The digest of the manifest; each part's record holds it."""

    def manifest(self) -> Manifest | None:
        """The manifest of the job that was begun here; None without one."""
        found = read_manifest(self.output)
        if found is None:
            return None
        manifest, self._job = found
        return manifest

    def begin(self, manifest: Manifest) -> None:
        """Removes what is here and begins a job."""
        with writing(self.folder):
            self._empty()
            text = sealed(manifest.as_json(), indent=1)
            write_whole(self._disk, self.folder / _MANIFEST, [text])
        self._job = _digest(text)
        self._has_begun = True

    def records(self) -> dict[int, PartRecord]:
        """The records of the parts that are done, by number. Raises OutputError for a
        damaged part. A part of another job does not count: its rows are computed
        again."""
        found = {}
        for path in self._part_paths():
            match = _NUMBER.fullmatch(path.name)
            assert match is not None, "they are parts"
            number, (job, record) = int(match[1]), _last_line(path)
            if job == self._job and record.number == number:
                found[number] = record
            else:
                _log.warning("%s is another part: its rows are done again", path)
        return dict(sorted(found.items()))

    def write(
        self, part: OutputPart, lines: Sequence[bytes], num_errors: int
    ) -> PartRecord:
        """Writes a part that is done. It is on disk when this returns."""
        self._check_held()
        digest = xxhash.xxh3_64()
        for line in lines:
            digest.update(line)
        record = PartRecord(
            number=part.number,
            first_row=part.first_row,
            start=part.start,
            num_rows=len(lines),
            num_errors=num_errors,
            end=part.end,
            input_digest=part.digest,
            num_bytes=sum(map(len, lines)),
            digest=digest.hexdigest(),
        )
        path = self._path(part.number)
        end = sealed({"job": self._job, "part": record.as_json()})
        with writing(path):
            write_whole(self._disk, path, [*lines, end])
        return record

    def lines(self, record: PartRecord) -> list[bytes]:
        """The results of a part as lines, after their checksum was compared. Raises
        OutputError where it differs."""
        path = self._path(record.number)
        if not path.exists():
            raise OutputError(f"{path} is gone: run again, to do its rows again")
        try:
            with open_regular(path, error=OutputError) as file:
                content = file.read(record.num_bytes)
        except OSError as error:
            raise OutputError(f"cannot read {path}: {error.strerror}") from error
        if _digest(content) != record.digest:
            raise _damaged(path)
        return [line + b"\n" for line in content.split(b"\n")[:-1]]

    def publish(self, chunks: Iterable[bytes]) -> None:
        """Writes `chunks` to disk, then gives them the name `output`."""
        self._check_held()
        joined = self.folder / _JOINED
        with writing(self.output):
            write_whole(self._disk, joined, chunks)
            put_in_place(self._disk, joined, self.output)

    def finish(self) -> None:
        """Removes the folder: all results are in `output`."""
        with writing(self.folder):
            self._empty()
        self._has_begun = False

    def close(self) -> None:
        """Releases the lock, and removes the folder if no job has begun in it."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            if not self._has_begun:
                self._disk.remove(self.folder / _LOCK)
                self._disk.remove_folder(self.folder)
        except OSError:
            pass  # other files are in it, or it cannot be written
        finally:
            lock.close()

    def abandon(self) -> None:
        """Removes a job that has begun but has no finished part."""
        if self._is_held() and not self._part_paths():
            self.finish()

    def _part_paths(self) -> list[Path]:
        return sorted(p for p in self.folder.iterdir() if _NUMBER.fullmatch(p.name))

    def _check_held(self) -> None:
        """Raises OutputError where the folder was replaced since it was locked."""
        if not self._is_held():
            raise OutputError(
                f"{self.folder} was removed while the job ran, and what was done with "
                "it: run again to begin anew"
            )

    def _is_held(self) -> bool:
        return self._lock is not None and _is_there(self._lock, self.folder / _LOCK)

    def _path(self, number: int) -> Path:
        return self.folder / _NAME.format(number)

    def _empty(self) -> None:
        """Removes all files of a job. The manifest goes first: without it the others do
        not count."""
        self._disk.remove(self.folder / _MANIFEST)
        self._disk.sync(self.folder)
        for path in sorted(self.folder.iterdir()):
            is_ours = path.name.startswith((_MANIFEST, _JOINED, "part-"))
            if is_ours:
                self._disk.remove(path)

    def _locked(self) -> IO[str]:
        """Opens and locks the lock file. A process that ends removes its file, and then
        another file may have that name: so the name is checked again after locking."""
        path = self.folder / _LOCK
        while True:
            self._disk.make_folder(self.folder)
            try:
                file = path.open("a+", encoding="utf-8")
            except FileNotFoundError:  # the folder was just removed
                if path.is_symlink():
                    raise UsageError(
                        f"{path} leads to a place that is not there: remove it"
                    ) from None
                continue
            try:
                self._lock_or_refuse(file)
                if _is_there(file, path):
                    file.truncate(0)
                    file.write(f"{os.getpid()}")
                    file.flush()
                    return file
            except BaseException:
                file.close()
                raise
            file.close()

    def _lock_or_refuse(self, file: IO[str]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UsageError(
                f"process {holder} is writing {self.output} already: wait for it, stop "
                "it, or name another output"
            ) from None


def _is_there(file: IO[str], path: Path) -> bool:
    mine = os.fstat(file.fileno())
    try:
        now = path.stat()
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (now.st_dev, now.st_ino)


def _last_line(path: Path) -> tuple[Any, PartRecord]:
    """The digest of the job and the record of a part. Raises OutputError where the file
    is not as it was written."""
    try:
        with open_regular(path, error=OutputError) as file:
            nbytes = file.seek(0, os.SEEK_END)
            file.seek(max(nbytes - _MOST_RECORD_BYTES, 0))
            text = file.read()
        values = unsealed(text[text.rfind(b"\n", 0, -1) + 1 :])
        return values["job"], PartRecord.from_json(values["part"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _digest(content: bytes) -> str:
    return xxhash.xxh3_64(content).hexdigest()


def _damaged(path: Path, error: Exception | None = None) -> OutputError:
    why = "" if error is None else f" ({error})"
    return OutputError(
        f"{path} is damaged{why}: remove it and run again, to do its rows again"
    )
