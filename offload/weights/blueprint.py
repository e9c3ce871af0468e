"""Makes a model on meta with the layout of its weights, from its checkpoint's headers,
or from config.json alone."""

from pathlib import Path

import torch

from ...io.checkpoint.header import FileStamp, TensorEntry
from ...io.checkpoint.index import INDEX_FILE, SINGLE_FILE, Checkpoint
from ...io.regular_file import read_json_object
from ..configs.opening import open_model
from . import hf
from .hf import Skeleton


def blueprint(
    folder: Path, dtype: str, *, trust_remote_code: bool = False
) -> tuple[Skeleton, bool]:
    """The model in `folder`, which computes in `dtype`, and whether its weights are
    there.

    No weight is read. Raises CheckpointError and UsageError as `hf.build` does.
    """
    has_weights = any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))
    has_weights = has_weights or not (folder / "config.json").exists()
    if has_weights:
        checkpoint = open_model(folder)
    else:
        checkpoint = imagined_checkpoint(folder, trust_remote_code=trust_remote_code)
    made = hf.build(checkpoint, dtype, trust_remote_code=trust_remote_code)
    return made, has_weights


def imagined_checkpoint(folder: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """A checkpoint of one file with all tensors of the model that config.json
    describes.

    They are in the model's order and in the stored dtype; tied ones occur once.
    """
    path = folder / SINGLE_FILE
    entries: dict[str, TensorEntry] = {}
    offset = 8
    state = hf.state_on_meta(
        folder, _stored_dtype(folder), trust_remote_code=trust_remote_code
    )
    for name, tensor in state.items():
        entries[name] = TensorEntry(
            name, tensor.dtype, tuple(tensor.shape), path, offset, tensor.nbytes
        )
        offset += tensor.nbytes
    return Checkpoint(folder, entries, {path: FileStamp(offset, 0)})


def _stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that the config names; bfloat16, which is the most frequent, if it
    names none."""
    values = read_json_object(folder / "config.json")
    name = values.get("dtype") or values.get("torch_dtype") or "bfloat16"
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16
