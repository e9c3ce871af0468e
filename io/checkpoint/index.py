"""Describes a Hugging Face safetensors checkpoint: its files, tensors and stamps."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ..errors import CheckpointError
from ..regular_file import MAX_INDEX_BYTES, read_json_object
from .header import FileStamp, TensorEntry, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


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


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Describes the checkpoint in `folder`.

    Reads the headers of `model.safetensors`, or of all shards that the index names.
    Raises CheckpointError if anything is missing or contradictory.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; give the folder of a Hugging Face checkpoint "
            f"(with config.json and {SINGLE_FILE} or {INDEX_FILE})"
        )
    if (folder / SINGLE_FILE).exists():  # before an index, like transformers
        return open_files(folder, [SINGLE_FILE])
    index_path = folder / INDEX_FILE
    if index_path.exists():
        weight_map = _read_index(index_path)
        checkpoint = open_files(folder, sorted(set(weight_map.values())))
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


def open_files(folder: Path, names: list[str]) -> Checkpoint:
    """The checkpoint of the files `names` in `folder`.

    Raises CheckpointError if a file is missing or a tensor is in two files.
    """
    entries: dict[str, TensorEntry] = {}
    stamps: dict[Path, FileStamp] = {}
    for name in names:
        path = folder / name
        if not path.exists():
            raise CheckpointError(
                f"shard {name} is missing from {folder}; the checkpoint has "
                f"{len(names)} files: download or copy the missing one"
            )
        stamps[path], stored = read_header(path)
        for entry in stored:
            if entry.name in entries:
                raise CheckpointError(
                    f"tensor {entry.name!r} is in two files of {folder}: "
                    f"{entries[entry.name].path.name} and {name}; download or save "
                    "the checkpoint again"
                )
            entries[entry.name] = entry
    return Checkpoint(folder, MappingProxyType(entries), MappingProxyType(stamps))


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: weight_map must map tensors to files; download it again"
        )
    for name in weight_map.values():
        if not _is_file_name(name):
            raise CheckpointError(
                f"{path}: weight_map names {name!r}, which is not a file beside it; "
                "download it again"
            )
    return weight_map


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
    for tensor, file in weight_map.items():
        entry = checkpoint.entries.get(tensor)
        if entry is None or entry.path.name != file:
            raise CheckpointError(
                f"{path} says that tensor {tensor!r} is in {file}, but it is not; "
                "download or save the checkpoint again"
            )
