"""A module's parameters on disk: written once, streamed from there, put back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import nn

from ...io.checkpoint import SINGLE_FILE, Checkpoint, open_files
from ...io.errors import OutputError, UsageError
from ...io.recipe import Recipe, plain
from ...io.residue import clone_at, residue_of
from ...io.tensor_file import write_tensors
from .bound import BoundParameter
from .poison import StreamedParameter
from .spill_folder import SpillFolder

_PREFIX = "wrapped-"


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
    strides: dict[str, tuple[int, ...]]
    """Of those that are not contiguous (channels_last, transposed)."""

    def restore(
        self, module: nn.Module, updated: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Puts the parameters back, bit for bit or as they were `updated`, laid out as
        they were, and removes the folder."""
        with safe_open(self.folder.path / SINGLE_FILE, framework="pt") as stored:
            for first, names in self.names.items():
                value = (updated or {}).get(first)
                value = stored.get_tensor(first) if value is None else value
                parameter = nn.Parameter(
                    self._laid_out(first, value), requires_grad=self.gradients[first]
                )
                for name in names:
                    owner, _, key = name.rpartition(".")
                    store = module.get_submodule(owner)._parameters
                    if not is_theirs(store.get(key)):
                        store[key] = parameter
        self.folder.cleanup()

    def _laid_out(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if name in self.strides:
            return _strided(value, self.strides[name])
        return clone_at(value, self.residues[name])


def is_theirs(parameter: nn.Parameter | None) -> bool:
    """Whether this is no stand-in: somebody has put it in the place of a streamed
    parameter."""
    return isinstance(parameter, torch.Tensor) and not isinstance(
        parameter, (StreamedParameter, BoundParameter)
    )


def _check_plain(name: str, parameter: torch.Tensor) -> None:
    """Raises UsageError for what is no tensor with values of its own: those are what is
    streamed."""
    if torch.nn.parameter.is_lazy(parameter):
        raise UsageError(
            f"{name!r} has no shape yet: call the module once (lazy modules get theirs "
            "so), then wrap it"
        )
    if parameter.device.type == "meta":
        raise UsageError(f"{name!r} is on meta: there are no values to stream")
    kind = type(parameter.data)
    if kind is not torch.Tensor or parameter.layout is not torch.strided:
        what = kind.__name__ if kind is not torch.Tensor else str(parameter.layout)
        raise UsageError(
            f"{name!r} is a {what}, not a plain tensor: wrap streams plain ones; take "
            "the module as it was before it was quantised, sharded or made sparse"
        )


def _in_buffers(module: nn.Module) -> str:
    """What is said of a module whose weights are no parameters."""
    nbytes = sum(buffer.nbytes for buffer in module.buffers())
    if not nbytes:
        return ""
    return (
        f": its {nbytes:,} bytes are buffers, as quantised modules keep them, which "
        "are not streamed; take it as it was before it was quantised"
    )


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
        _check_plain(name, parameter)
        first = first_of.setdefault(id(parameter), name)
        names.setdefault(first, []).append(name)
        tensors[first] = parameter.detach()
    if not tensors:
        raise UsageError(
            f"{type(module).__name__} has no parameters to stream{_in_buffers(module)}"
        )
    residues = {name: residue_of(tensor) for name, tensor in tensors.items()}
    folder = SpillFolder(cache, _PREFIX)
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
        {n: p.stride() for n, p in parameters.items() if not p.is_contiguous()},
    )


def _strided(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """The same values, laid out otherwise."""
    found = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype)
    return found.copy_(tensor)
