"""Describes a Hugging Face safetensors checkpoint: its files, tensors and stamps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError
from ..regular_file import MAX_INDEX_BYTES, read_json_object
from .header import FileStamp, TensorEntry, parse, read_text
from .header_cache import Header, HeaderCache

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PARALLEL_READS = 8


@dataclass(frozen=True)
class Checkpoint:
    """An immutable description of a checkpoint; it holds no open file."""

    folder: Path
    entries: Mapping[str, TensorEntry]
    """Each stored tensor, by its name in the files."""
    stamps: Mapping[Path, FileStamp]
    """The stamp of each file when its header was read."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())


def open_checkpoint(folder: str | Path, caches: Path | None = None) -> Checkpoint:
    """Describes the checkpoint in `folder`.

    Reads the headers of `model.safetensors`, or of all shards that the index names.
    Those of large checkpoints are kept in the folder `caches`, if there is one.
    Raises CheckpointError if anything is missing or contradictory.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; give the folder of a Hugging Face checkpoint "
            f"(with config.json and {SINGLE_FILE} or {INDEX_FILE})"
        )
    if (folder / SINGLE_FILE).exists():  # before an index, like transformers
        return open_files(folder, [SINGLE_FILE], caches)
    index_path = folder / INDEX_FILE
    if index_path.exists():
        weight_map = _read_index(index_path)
        checkpoint = open_files(folder, sorted(set(weight_map.values())), caches)
        _check_index(index_path, weight_map, checkpoint)
        return checkpoint
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds an adapter, not a model: give the folder of its base "
            f"model, and this one as --adapter {folder}"
        )
    others = [p for kind in ("bin", "gguf", "pt") for p in folder.glob(f"*.{kind}")]
    advice = (
        f"it has {min(others).name}, which is another format: save it with "
        "model.save_pretrained(...) first"
        if others
        else "give the folder of a downloaded Hugging Face checkpoint"
    )
    raise CheckpointError(f"{folder} has no {SINGLE_FILE} nor {INDEX_FILE}; {advice}")


def open_files(
    folder: Path, names: list[str], caches: Path | None = None
) -> Checkpoint:
    """The checkpoint of the files `names` in `folder`.

    Raises CheckpointError if a file is missing or a tensor is in two files.
    """
    paths = [folder / name for name in names]
    for path in paths:
        if not path.exists():
            raise CheckpointError(
                f"shard {path.name} is missing from {folder}; the checkpoint has "
                f"{len(names)} files: download or copy the missing one"
            )
    entries: dict[str, TensorEntry] = {}
    stamps: dict[Path, FileStamp] = {}
    for path, (stamp, stored) in _headers(folder, paths, caches).items():
        stamps[path] = stamp
        for entry in stored:
            if entry.name in entries:
                raise CheckpointError(
                    f"tensor {entry.name!r} is in two files of {folder}: "
                    f"{entries[entry.name].path.name} and {path.name}; download or "
                    "save the checkpoint again"
                )
            entries[entry.name] = entry
    return Checkpoint(folder, MappingProxyType(entries), MappingProxyType(stamps))


def _headers(
    folder: Path, paths: Sequence[Path], caches: Path | None
) -> dict[Path, Header]:
    """The headers of `paths`, files in `folder`, from its cache or from the files."""
    cache = HeaderCache(caches, folder) if caches is not None else None
    known = cache.get(paths) if cache is not None else {}
    read = dict(_read([path for path in paths if path not in known]))
    found = {path: known.get(path) or read[path] for path in paths}
    if read and cache is not None:
        cache.put(found)
    return found


def _read(paths: Sequence[Path]) -> Iterator[tuple[Path, Header]]:
    """Reads headers: a few at a time, since one alone may have 100 MB."""
    if len(paths) < 2:
        texts = map(read_text, paths)
        yield from ((one.path, (one.stamp, parse(one))) for one in texts)
        return
    with ThreadPoolExecutor(_PARALLEL_READS, "penstock-header") as pool:
        for start in range(0, len(paths), _PARALLEL_READS):
            group = paths[start : start + _PARALLEL_READS]
            for one in pool.map(read_text, group):
                yield one.path, (one.stamp, parse(one))


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: weight_map must map tensors to files; download it again"
        )
    for name in _distinct(weight_map.values()):
        if not _is_file_name(name):
            raise CheckpointError(
                f"{path}: weight_map names {name!r}, which is not a file beside it; "
                "download it again"
            )
    return weight_map


def _distinct(values: Iterable[Any]) -> Iterator[Any]:
    """The distinct strings of `values`, and all that are no strings."""
    seen: set[str] = set()
    for value in values:
        if not isinstance(value, str):
            yield value
        elif value not in seen:
            seen.add(value)
            yield value


def _is_file_name(name: object) -> bool:
    """Whether `name` is a plain file name of a shard, without any folder."""
    return (
        isinstance(name, str)
        and Path(name).name == name
        and name.endswith(".safetensors")
        and len(name.encode(errors="replace")) < 256
        and "\0" not in name
    )


def _check_index(
    path: Path, weight_map: dict[str, str], checkpoint: Checkpoint
) -> None:
    paths = {stored.name: stored for stored in checkpoint.stamps}
    for tensor, file in weight_map.items():
        entry = checkpoint.entries.get(tensor)
        if entry is None or entry.path is not paths[file]:
            raise CheckpointError(
                f"{path} says that tensor {tensor!r} is in {file}, but it is not; "
                "download or save the checkpoint again"
            )
