"""Makes the manifest of a job: what its input, its model and its options are."""

import os
import platform
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...io.errors import CheckpointError
from ...io.readers.checksums import SIDE_FILE
from ..configs.opening import open_model
from ..configs.trust import check_files
from ..files.fingerprint import content_digest, fingerprint
from ..files.inputs import Inputs
from ..files.parts import Cut
from ..policy import Policy
from .manifest import Manifest

_SUFFIXES = (".json", ".jinja", ".txt", ".model")
"""Suffixes of the files, beside the weights, that make a model and its tokenizer."""
_MEANING = ("dtype",)
_ROUNDING = (
    "device",
    "micro_batch_tokens",
    "tokens_in_flight",
    "micro_batch_sequences",
    "sequences_in_flight",
    "coalesce",
    "compile",
)


def identify(
    inputs: Inputs,
    model: Path,
    policy: Policy,
    task: Mapping[str, Any],
    cut: Cut,
    *,
    num_threads: int,
    chosen: Mapping[str, Any],
) -> Manifest:
    """The manifest of a job that runs with `policy`, whose values `chosen` were left
    open by the user. Reads at most 1 MiB of each file of weights or rows, whose size
    and samples identify it, and small files as a whole. Raises CheckpointError."""
    return Manifest(
        input=inputs.identity(),
        model=model_digests(model),
        meaning={
            **task,
            **{key: getattr(policy, key) for key in _MEANING},
            "kv.dtype": policy.kv.dtype,
            "adapter": policy.adapter and adapter_digests(policy.adapter),
        },
        rounding={
            **{key: getattr(policy, key) for key in _ROUNDING},
            "threads": num_threads,
        },
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
            "penstock": import_module(__name__.partition(".")[0]).__version__,
        },
        cut={"num_rows": cut.num_rows, "num_bytes": cut.num_bytes},
        stamps=inputs.stamps(),
        chosen=chosen,
    )


def adapter_digests(folder: Path) -> dict[str, str]:
    """The digests of the files of an adapter, by name. Raises CheckpointError."""
    check_files(folder)
    try:
        files = sorted(path for path in folder.glob("adapter_*") if path.is_file())
        return {path.name: content_digest(path) for path in files}
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}") from error


def model_digests(folder: Path) -> dict[str, str]:
    """The digests of the files of a checkpoint, by name. Raises CheckpointError."""
    weights = {path.name for path in open_model(folder).stamps}
    found = {}
    try:
        for name in sorted(os.listdir(folder)):
            path = folder / name
            if name in weights:
                found[name] = fingerprint(path)
            elif name.endswith(_SUFFIXES) and name != SIDE_FILE and path.is_file():
                found[name] = content_digest(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}") from error
    return found
