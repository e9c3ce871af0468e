"""Makes a model on meta with the layout of its weights, from its checkpoint's headers,
or from config.json alone."""

from pathlib import Path

from ...io.checkpoint.index import INDEX_FILE, SINGLE_FILE
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
    if not has_weights:
        return hf.imagine(folder, dtype, trust_remote_code=trust_remote_code), False
    checkpoint = open_model(folder)
    made = hf.build(checkpoint, dtype, trust_remote_code=trust_remote_code)
    return made, True
