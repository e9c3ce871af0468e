"""A model on meta and the places of its weights: by its checkpoint's headers, or by
config.json alone, as if they lay in one file."""

import json
from pathlib import Path

import torch

from ...io.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, open_checkpoint
from ...io.errors import CheckpointError
from ...io.header import FileStamp, TensorEntry
from . import hf
from .hf import Skeleton


def blueprint(folder: Path, dtype: str) -> tuple[Skeleton, bool]:
    """The model in `folder`, computing in `dtype`, and whether its weights are there.
    No weight is read. Raises CheckpointError and UsageError as `hf.build` does."""
    has_weights = any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))
    if has_weights or not (folder / "config.json").exists():
        return hf.build(open_checkpoint(folder), dtype), True
    return hf.build(imagined_checkpoint(folder), dtype), False


def imagined_checkpoint(folder: Path) -> Checkpoint:
    """One file with all the tensors that the model of config.json has, in its order and
    dtype, tied ones once."""
    path = folder / SINGLE_FILE
    entries: dict[str, TensorEntry] = {}
    offset = 8
    for name, tensor in hf.state_on_meta(folder, _stored_dtype(folder)).items():
        entries[name] = TensorEntry(
            name, tensor.dtype, tuple(tensor.shape), path, offset, tensor.nbytes
        )
        offset += tensor.nbytes
    return Checkpoint(folder, entries, {path: FileStamp(offset, 0)})


def _stored_dtype(folder: Path) -> torch.dtype:
    """What the config says; bfloat16, as nearly all are, where it says nothing."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # UnicodeDecodeError is one
        raise CheckpointError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold an object, not {values!r}")
    name = values.get("dtype") or values.get("torch_dtype") or "bfloat16"
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16
