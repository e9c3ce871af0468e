"""A Hugging Face safetensors checkpoint as it lies on disk: files, tensors, stamps."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ..errors import CheckpointError
from ..whole import MAX_INDEX_BYTES, read_json_object
from .header import FileStamp, TensorEntry, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """Immutable description of a checkpoint; holds no open file."""

    folder: Path
    entries: Mapping[str, TensorEntry]
    """By tensor name as stored in the files."""
    stamps: Mapping[Path, FileStamp]
    """Size and mtime of each file when its header was read."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads the headers of `folder`'s `model.safetensors`, or of all the shards that
    its index names. Raises CheckpointError for anything missing or contradictory."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder; give the folder of a Hugging Face checkpoint "
            f"(with config.json and {SINGLE_FILE} or {INDEX_FILE})"
        )
    if (folder / SINGLE_FILE).exists():  # where there is an index, too, as transformers
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
    """The checkpoint made of the files `names` in `folder`."""
    entries: dict[str, TensorEntry] = {}
    stamps: dict[Path, FileStamp] = {}
    for name in names:
        path = folder / name
        if not path.exists():
            raise CheckpointError(
                f"shard {name} is missing from {folder}; the checkpoint has "
                f"{len(names)} files: download or copy the missing one"
            )
        stamps[path], found = read_header(path)
        for entry in found:
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
                f"{path}: weight_map names {name!r}, which is no file beside it; "
                "download it again"
            )
    return weight_map


def _is_file_name(name: object) -> bool:
    """A plain name of a shard: nothing that leads out of the folder."""
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
