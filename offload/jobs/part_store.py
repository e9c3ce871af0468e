"""The folder in which a job's results stand until it is done.

`OUTPUT.parts` holds `lock`, `manifest.json` (what job this is) and a file for each part
that is done: its results, one JSON object a line, and its record as the last line. Each
appears as a whole, by a rename, so there is no list of them to keep in step. A folder
without a manifest holds nothing.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import xxhash

from ...io.closing import Closing
from ...io.disk import Disk, put_in_place, write_whole
from ...io.errors import OutputError, UsageError
from ...io.whole import MAX_INDEX_BYTES, read_json
from ..files.parts import Part, PartRecord
from .manifest import Manifest

_LOCK, _MANIFEST, _JOINED = "lock", "manifest.json", "joined"
_NAME = "part-{:08}.jsonl"
_NUMBER = re.compile(r"part-(\d{8,})\.jsonl")
_MOST_RECORD_BYTES = 4096
_BEGIN_ANEW = "begin anew with --restart"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError into an OutputError that says how to go on."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; what is done stays: make room, or "
            "make it writable, and run again to go on"
        ) from error


def parts_folder(output: Path) -> Path:
    """Where the parts of `output` are kept until all are done."""
    return output.with_name(output.name + ".parts")


def read_manifest(output: Path) -> Manifest | None:
    """Of the job that was begun for `output`, if one was."""
    path = parts_folder(output) / _MANIFEST
    if not path.exists():
        return None
    values = read_json(path, MAX_INDEX_BYTES, error=OutputError, fix=_BEGIN_ANEW)
    try:
        return Manifest.from_json(values)
    except (KeyError, TypeError) as error:
        raise OutputError(
            f"{path} is no manifest of this version ({error!r}): finish the job "
            "with the version that began it, or begin anew with --restart"
        ) from error


class PartStore(Closing):
    """The parts of the job that writes `output`, locked for this process until it is
    closed. Raises OutputError where nothing can be written, UsageError where another
    process has the lock."""

    def __init__(self, output: Path, disk: Disk) -> None:
        self.output = output
        self.folder = parts_folder(output)
        self._disk = disk
        with writing(self.folder):
            self._lock: IO[str] | None = self._locked()
        self._has_begun = (self.folder / _MANIFEST).exists()

    def manifest(self) -> Manifest | None:
        """Of the job that was begun here, if one was."""
        return read_manifest(self.output)

    def begin(self, manifest: Manifest) -> None:
        """Forgets what is here and begins a job."""
        with writing(self.folder):
            self._empty()
            text = json.dumps(manifest.as_json(), indent=1).encode() + b"\n"
            write_whole(self._disk, self.folder / _MANIFEST, [text])
        self._has_begun = True

    def records(self) -> dict[int, PartRecord]:
        """Of the parts that are done, by number."""
        found = {}
        for path in sorted(self.folder.iterdir()):
            if match := _NUMBER.fullmatch(path.name):
                found[int(match[1])] = _record(path)
        return dict(sorted(found.items()))

    def write(self, part: Part, lines: Sequence[bytes], num_errors: int) -> PartRecord:
        """Keeps a part that is done. It is on disk when this returns."""
        digest = xxhash.xxh3_64()
        for line in lines:
            digest.update(line)
        record = PartRecord(
            number=part.number,
            first_row=part.first_row,
            num_rows=len(lines),
            num_errors=num_errors,
            end=part.end,
            input_digest=part.digest,
            num_bytes=sum(map(len, lines)),
            digest=digest.hexdigest(),
        )
        path = self._path(part.number)
        end = json.dumps({"part": record.as_json()}).encode() + b"\n"
        with writing(path):
            write_whole(self._disk, path, [*lines, end])
        return record

    def lines(self, record: PartRecord) -> list[bytes]:
        """The results of a part, compared with its checksum."""
        path = self._path(record.number)
        try:
            with path.open("rb") as file:
                content = file.read(record.num_bytes)
        except OSError as error:
            raise OutputError(f"cannot read {path}: {error.strerror}") from error
        if xxhash.xxh3_64(content).hexdigest() != record.digest:
            raise OutputError(
                f"{path} is damaged: remove it and run again, to do its rows again"
            )
        return [line + b"\n" for line in content.split(b"\n")[:-1]]

    def publish(self, chunks: Iterable[bytes]) -> None:
        """Gives `output` its content, once all of it is on disk."""
        joined = self.folder / _JOINED
        with writing(self.output):
            write_whole(self._disk, joined, chunks)
            put_in_place(self._disk, joined, self.output)

    def finish(self) -> None:
        """Removes the folder: `output` has all of it."""
        with writing(self.folder):
            self._empty()
        self._has_begun = False

    def close(self) -> None:
        """Gives the lock back; removes the folder if no job has begun in it."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            if not self._has_begun:
                self._disk.remove(self.folder / _LOCK)
                self._disk.remove_folder(self.folder)
        except OSError:
            pass  # somebody else's files are in it, or it cannot be written
        finally:
            lock.close()

    def abandon(self) -> None:
        """Forgets a job that has begun but of which nothing is done."""
        if not any(_NUMBER.fullmatch(path.name) for path in self.folder.iterdir()):
            self.finish()

    def _path(self, number: int) -> Path:
        return self.folder / _NAME.format(number)

    def _empty(self) -> None:
        """The manifest goes first: from then on nothing else counts."""
        self._disk.remove(self.folder / _MANIFEST)
        self._disk.sync(self.folder)
        for path in sorted(self.folder.iterdir()):
            is_ours = path.name.startswith((_MANIFEST, _JOINED, "part-"))
            if is_ours:
                self._disk.remove(path)

    def _locked(self) -> IO[str]:
        """The open lock file. A process that ends removes it: then there is another
        one of that name."""
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


def _record(path: Path) -> PartRecord:
    """The last line of a part."""
    try:
        with path.open("rb") as file:
            nbytes = file.seek(0, os.SEEK_END)
            file.seek(max(nbytes - _MOST_RECORD_BYTES, 0))
            last = file.read().splitlines()[-1]
        record = PartRecord.from_json(json.loads(last)["part"])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        RecursionError,
    ) as error:
        raise OutputError(
            f"{path} is damaged ({error!r}): remove it and run again, to do its rows "
            "again"
        ) from error
    return record
