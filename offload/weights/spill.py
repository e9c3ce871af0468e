"""A module's parameters on disk: written once, streamed from there, put back."""

import contextlib
import fcntl
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

import torch
from safetensors import safe_open
from torch import nn

from ...io.checkpoint import SINGLE_FILE, Checkpoint, open_files
from ...io.errors import OutputError, UsageError
from ...io.home import Home
from ...io.recipe import Recipe, plain
from ...io.residue import clone_at, residue_of
from ...io.tensor_file import write_tensors

_PREFIX = "wrapped-"
_LOCK = "in-use"


@dataclass(frozen=True)
class Spilled:
    """The parameters of one module in a temporary folder."""

    folder: "SpillFolder"
    checkpoint: Checkpoint
    recipes: dict[str, Recipe]
    names: dict[str, list[str]]
    """All names of each tied parameter, by the name it is stored under."""
    gradients: dict[str, bool]
    residues: dict[str, int]
    """Addresses of the parameters modulo 64 bytes, in the module and in the file."""

    def restore(self, module: nn.Module) -> None:
        """Puts the parameters back, bit for bit and aligned as they were, and removes
        the folder."""
        with safe_open(self.folder.path / SINGLE_FILE, framework="pt") as stored:
            for first, names in self.names.items():
                parameter = nn.Parameter(
                    clone_at(stored.get_tensor(first), self.residues[first]),
                    requires_grad=self.gradients[first],
                )
                for name in names:
                    owner, _, key = name.rpartition(".")
                    module.get_submodule(owner)._parameters[key] = parameter
        self.folder.cleanup()


class SpillFolder:
    """A folder in `cache` that is removed when it is cleaned up or dropped, or at exit
    of the process that made it (not of one that was forked). It is locked meanwhile:
    what killed processes have left is known by that, and removed."""

    def __init__(self, cache: Path) -> None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(cache)
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=cache)).absolute()
            lock = (self.path / _LOCK).open("w")
            self._finaliser = weakref.finalize(self, _remove, self.path, lock, Home())
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise OutputError(
                f"cannot make a folder in {cache} ({error.strerror}); set io.cache to "
                "a folder that can be written"
            ) from error

    def cleanup(self) -> None:
        """Removes it. Nothing if that has been done."""
        self._finaliser()


def _remove(path: Path, lock: TextIO, home: Home) -> None:
    if home.is_here:
        shutil.rmtree(path, ignore_errors=True)
    lock.close()


def _remove_abandoned(cache: Path) -> None:
    for path in cache.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), (path / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)


def spill(module: nn.Module, dtype: str, cache: Path) -> Spilled:
    """Writes the parameters of `module`, once, to a safetensors file in a folder of its
    own in `cache`, which is removed when they are put back. Floating ones
    are cast to `dtype` (unless "auto") when they are streamed. The module itself is not
    changed yet.

    Raises OutputError when the disk is full, UsageError when there is nothing to do.
    """
    names: dict[str, list[str]] = {}
    tensors: dict[str, torch.Tensor] = {}
    first_of: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.device.type == "meta":
            raise UsageError(f"{name!r} is on meta: there are no values to stream")
        first = first_of.setdefault(id(parameter), name)
        names.setdefault(first, []).append(name)
        tensors[first] = parameter.detach()
    if not tensors:
        raise UsageError(f"{type(module).__name__} has no parameters to stream")
    residues = {name: residue_of(tensor) for name, tensor in tensors.items()}
    folder = SpillFolder(cache)
    try:
        # Under another name first: what has the final one is whole.
        partial = folder.path / f"{SINGLE_FILE}.partial"
        write_tensors(partial, tensors, residues)
        partial.rename(partial.with_suffix(""))
    except Exception as error:
        folder.cleanup()
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        raise OutputError(
            f"writing {nbytes} bytes of parameters to {folder.path} failed ({error}); "
            "set io.cache to a folder with room for them"
        ) from error
    checkpoint = open_files(folder.path, [SINGLE_FILE])
    wanted = None if dtype == "auto" else cast(torch.dtype, getattr(torch, dtype))
    recipes = {}
    for name in tensors:
        entry = checkpoint.entries[name]
        is_floating = entry.dtype.is_floating_point
        kind = wanted if wanted is not None and is_floating else entry.dtype
        recipes[name] = plain(entry, name=name, dtype=kind)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return Spilled(
        folder,
        checkpoint,
        recipes,
        names,
        {name: parameters[name].requires_grad for name in tensors},
        residues,
    )
