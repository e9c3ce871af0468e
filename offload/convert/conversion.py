"""Converts a checkpoint, file by file, into a folder; goes on where it was ended."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ...io.checkpoint.header import TensorEntry, read_header
from ...io.checkpoint.index import INDEX_FILE, SINGLE_FILE
from ...io.errors import CheckpointError, MachineError, OutputError, UsageError
from ...io.readers.checksums import SIDE_FILE
from ...io.regular_file import read_json_object, read_whole
from ..configs import trust
from ..configs.opening import open_model
from ..files.durable import DurableFiles, put_in_place, sealed, unsealed, write_whole
from .choosing import ChosenWeights, choose_linear, choose_lossless
from .schemes import Scheme, TargetFormat, Unchanged
from .shard import Shard, write_shard

CONFIG_FILE = "config.json"
RECORD_FILE = "conversion.json"
"""Says of what, and how, a folder was converted; it is written first."""
_PARTIAL = ".partial"
_QUANTISED = ("quantization_config", "compression_config")
_BESIDE = "hf_quant_config.json"
_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".md")
"""The files of a model, beside its weights and config.json."""
_LICENCES = ("LICENSE", "LICENCE", "NOTICE")
_MOST_BYTES = 256 << 20

Progress = Callable[[int, int], None]
"""Is told how many bytes of how many have been read."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion made."""

    num_converted: int
    num_tensors: int
    """Stored tensors of the model, converted or not."""
    ignored: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    was_there: bool
    """Whether the folder held all of it already."""


class Conversion:
    """One checkpoint, one folder, one format."""

    def __init__(
        self, model: Path, out: Path, target: TargetFormat, *, group: int, ignore: str
    ) -> None:
        """Raises UsageError for what cannot be done, before anything is written."""
        self._scheme = Unchanged() if target == "lossless" else Scheme(target, group)
        self._model, self._out = model, out
        if out.exists() and model.exists() and out.samefile(model):
            raise UsageError(
                f"{out} is the model itself: name another folder, which gets a "
                "converted copy"
            )
        if model.resolve() in out.resolve().parents:
            raise UsageError(
                f"{out} is in the folder of the model, which is only read: name one "
                "outside of it"
            )
        self._checkpoint = open_model(model)
        self._config = _config_of(model)
        self._ignore = ignore
        self._record = {
            "format": target,
            "group": group if target == "int4" else None,
            "ignore": ignore,
            "version": 1,
            "config": xxhash.xxh3_128(
                read_whole(model / CONFIG_FILE, _MOST_BYTES)
            ).hexdigest(),
            "files": {
                path.name: [stamp.size_bytes, stamp.mtime_ns]
                for path, stamp in sorted(self._checkpoint.stamps.items())
            },
        }
        _check_folder(out, self._record)

    def run(self, progress: Progress, disk: DurableFiles | None = None) -> Converted:
        """Writes what is missing. Raises MachineError where the disk has no room,
        OutputError where it cannot be written."""
        disk = disk or DurableFiles()
        choice = self._choice()
        if (self._out / CONFIG_FILE).exists():
            return self._result(choice, was_there=True)
        shards = dict(self._shards(choice))
        _check_names(shards.values())
        left = {n: s for n, s in shards.items() if not (self._out / n).exists()}
        try:
            self._check_room(left)
            disk.make_folder(self._out)
            with _locked(self._out):
                self._write(left, progress, disk)
                self._finish(shards, choice, disk)
        except OSError as error:
            room = " (no room is left)" if error.errno == errno.ENOSPC else ""
            raise OutputError(
                f"cannot write {self._out}{room}: {error.strerror or error}; run the "
                "same command again to go on"
            ) from error
        return self._result(choice, was_there=False)

    def _choice(self) -> ChosenWeights:
        if isinstance(self._scheme, Scheme):
            return choose_linear(self._checkpoint, self._scheme, self._ignore)
        return choose_lossless(self._checkpoint, self._ignore)

    def _write(
        self, left: dict[str, Shard], progress: Progress, disk: DurableFiles
    ) -> None:
        if not (self._out / RECORD_FILE).exists():
            write_whole(disk, self._out / RECORD_FILE, [sealed(self._record, indent=2)])
        total = sum(_bytes_of(shard.tensors) for shard in left.values())
        done = 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        for name, shard in left.items():
            partial = self._out / (name + _PARTIAL)
            stamp = self._checkpoint.stamps[self._checkpoint.folder / name]
            write_shard(shard, partial, stamp, count)
            put_in_place(disk, partial, self._out / name)

    def _finish(
        self, shards: dict[str, Shard], choice: ChosenWeights, disk: DurableFiles
    ) -> None:
        """Writes all but the weights; config.json last: now it is a checkpoint."""
        if shards.keys() != {SINGLE_FILE}:
            self._write_index(shards, disk)
        self._copy_others(disk)
        section = self._scheme.section(choice.ignored)
        config = {**self._config, "quantization_config": section}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        write_whole(disk, self._out / CONFIG_FILE, [text.encode()])

    def _shards(self, choice: ChosenWeights) -> Iterator[tuple[str, Shard]]:
        """What each file becomes, by its name."""
        by_path: dict[Path, list[TensorEntry]] = {
            p: [] for p in self._checkpoint.stamps
        }
        for entry in self._checkpoint.entries.values():
            by_path[entry.path].append(entry)
        for path, entries in sorted(by_path.items()):
            tensors = tuple(sorted(entries, key=lambda entry: entry.offset))
            yield path.name, Shard(tensors, choice.weights, self._scheme)

    def _check_room(self, left: dict[str, Shard]) -> None:
        """Raises MachineError if what is `left` does not fit on the drive."""
        needed = sum(shard.nbytes for shard in left.values())
        there = self._out.absolute()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        for name in left:
            partial = self._out / (name + _PARTIAL)
            free += partial.stat().st_size if partial.exists() else 0
        if needed > free:
            raise MachineError(
                f"{self._out} needs {needed:,} bytes, and its drive has {free:,} free: "
                "name a folder on another drive, or make room"
            )

    def _write_index(self, shards: dict[str, Shard], disk: DurableFiles) -> None:
        weight_map: dict[str, str] = {}
        total = 0
        for name in shards:
            _, entries = read_header(self._out / name)
            weight_map.update((entry.name, name) for entry in entries)
            total += _bytes_of(entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        write_whole(disk, self._out / INDEX_FILE, [text.encode()])

    def _copy_others(self, disk: DurableFiles) -> None:
        for source in _others(self._model):
            target = self._out / source.relative_to(self._model)
            disk.make_folder(target.parent)
            write_whole(disk, target, [read_whole(source, _MOST_BYTES)])

    def _result(self, choice: ChosenWeights, *, was_there: bool) -> Converted:
        made = open_model(self._out)
        return Converted(
            len(choice.weights),
            len(self._checkpoint.entries),
            choice.ignored,
            self._checkpoint.num_bytes,
            made.num_bytes,
            was_there,
        )


def _config_of(model: Path) -> dict[str, Any]:
    """The content of config.json. Raises UsageError for a model that is quantised."""
    trust.check_files(model)
    config = read_json_object(model / CONFIG_FILE)
    for key in _QUANTISED:
        if (found := config.get(key)) is not None:
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise UsageError(
                f"{model} is quantised already ({method or key}), which would lose "
                "more: convert an unquantised release"
            )
    if (model / _BESIDE).exists():
        raise UsageError(
            f"{model} is quantised already ({_BESIDE} is there), which would lose "
            "more: convert an unquantised release"
        )
    return config


def _check_folder(out: Path, record: dict[str, Any]) -> None:
    """Raises UsageError if `out` holds something else than this conversion."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    fix = "name another folder, or remove this one"
    if not out.is_dir():
        raise UsageError(f"{out} is no folder: {fix}")
    path = out / RECORD_FILE
    others = [p.name for p in out.iterdir() if p.name != f"{RECORD_FILE}.new"]
    if not path.exists() and others:
        raise UsageError(f"{out} holds something else ({min(others)}): {fix}")
    if not path.exists():
        return
    try:
        found = unsealed(read_whole(path, _MOST_BYTES, error=UsageError))
    except ValueError as error:
        raise UsageError(f"{path} cannot be used, {error}: {fix}") from None
    differ = sorted(key for key in record if found.get(key) != record[key])
    if differ:
        what = ", ".join(f"{key} {found.get(key)!r:.60}" for key in differ)
        raise UsageError(f"{out} holds another conversion ({what}): {fix}")


def _check_names(shards: Iterable[Shard]) -> None:
    """Raises CheckpointError if what is stored for two tensors has one name."""
    found: dict[str, TensorEntry] = {}
    for shard in shards:
        for entry in shard.tensors:
            for name in shard.names_for(entry):
                if (other := found.setdefault(name, entry)) is not entry:
                    raise CheckpointError(
                        f"{entry.path}: {other.name!r} and {entry.name!r} would both "
                        f"be stored as {name!r}: the model has remains of another "
                        "conversion; take another release of it"
                    )


def _others(model: Path) -> Iterator[Path]:
    """The files of a model that are copied: those of its tokenizer and the like, here
    and one folder below."""
    inner = (path for path in model.iterdir() if path.is_dir())
    own = (CONFIG_FILE, INDEX_FILE, RECORD_FILE, SIDE_FILE)
    for folder in (model, *sorted(inner)):
        for path in sorted(folder.iterdir()):
            is_kind = path.suffix in _COPIED or path.name.startswith(_LICENCES)
            is_own = folder == model and path.name in own
            is_index = path.name.endswith(".index.json")
            if is_kind and path.is_file() and not (is_own or is_index):
                yield path


def _bytes_of(entries: tuple[TensorEntry, ...]) -> int:
    return sum(entry.nbytes for entry in entries)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process. Raises UsageError if another one has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another process is writing {folder}: wait for it, or name another "
                "folder"
            ) from None
        yield
    finally:
        os.close(descriptor)
