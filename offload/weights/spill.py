"""Writes a module's parameters to disk, from where they are streamed, and puts them
back at the end."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import nn

from ...io.checkpoint.index import SINGLE_FILE, Checkpoint, open_files
from ...io.errors import OutputError, UsageError
from ...io.weights.recipe import Recipe, plain
from ...io.weights.residue import clone_at, residue_of
from ...io.weights.tensor_file import write_tensors
from .bound_parameter import BoundParameter
from .placeholder import StreamedParameter
from .spill_folder import SpillFolder

_PREFIX = "wrapped-"


@dataclass(slots=True)
class Spilled:
    """The parameters of one module, in a temporary folder."""

    folder: "SpillFolder"
    checkpoint: Checkpoint
    recipes: dict[str, Recipe]
    places: dict[str, list[tuple[nn.Module, str]]]
    """Where each parameter was used, by the name under which it is stored; a tied one
    was used in several modules."""
    gradients: dict[str, bool]
    residues: dict[str, int]
    """The address of each parameter modulo 64 bytes, in the module and in the file."""
    strides: dict[str, tuple[int, ...]]
    """The strides of parameters that are not contiguous (channels_last, transposed)."""
    changed: dict[str, torch.Tensor] | None = None
    """The values that `restore` uses instead of the stored ones; None until they are
    known."""
    is_restored: bool = False

    def written(
        self, resident: Mapping[str, torch.Tensor], updated: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Copies of the resident weights that user code has changed since they were
        loaded.

        They were loaded from the file, or from `updated` if they are there. Both
        mappings are by name.
        """
        found = {}
        with safe_open(self.folder.path / SINGLE_FILE, framework="pt") as stored:
            for name in resident.keys() & self.places.keys():
                loaded, now = updated.get(name), resident[name]
                loaded = stored.get_tensor(name) if loaded is None else loaded
                was_written = isinstance(now, BoundParameter) and now.was_written
                if was_written or _is_other(now.detach(), loaded):
                    found[name] = now.detach().to("cpu", loaded.dtype, copy=True)
        return found

    def restore(self, module: nn.Module) -> None:
        """Puts the parameters back, and removes the folder.

        They are as they were, bit for bit and with the same strides, or as they were
        `changed`. A parameter that was moved to another place since comes back there.
        What user code has put in place of one stays. May be called again if it was
        interrupted.
        """
        if not self.is_restored:
            self._put_back(module, self.changed or {})
            self.is_restored = True
        self.folder.cleanup()

    def _put_back(self, module: nn.Module, changed: Mapping[str, torch.Tensor]) -> None:
        inside = [(part, key) for part in module.modules() for key in part._parameters]
        with safe_open(self.folder.path / SINGLE_FILE, framework="pt") as stored:
            back = {}
            for name in self.places:
                value = changed.get(name)
                value = stored.get_tensor(name) if value is None else value
                back[name] = nn.Parameter(
                    self._laid_out(name, value), requires_grad=self.gradients[name]
                )
        for name, places in self.places.items():
            for part, key in places:
                if not _has(part, key):
                    part._parameters[key] = back[name]
                inside.append((part, key))
        for part, key in inside:
            found = streamed_name(part._parameters.get(key))
            if found is not None and found in back:
                part._parameters[key] = back[found]

    def _laid_out(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if name in self.strides:
            return _strided(value, self.strides[name])
        return clone_at(value, self.residues[name])


def streamed_name(parameter: torch.Tensor | None) -> str | None:
    """The name of the streamed weight that `parameter` is; None if user code has put
    something else there."""
    if isinstance(parameter, StreamedParameter):
        return parameter._name
    return parameter.streamed_name if isinstance(parameter, BoundParameter) else None


def _has(module: nn.Module, key: str) -> bool:
    """Whether `module` has an attribute `key`."""
    found = key in module._parameters or key in module.__dict__
    return found or hasattr(type(module), key)


def _is_other(now: torch.Tensor, loaded: torch.Tensor) -> bool:
    """Whether the bits differ. False if the dtypes do, since a cast does not count."""
    if now.dtype != loaded.dtype:
        return False
    one, other = (t.contiguous().view(-1).view(torch.uint8) for t in (now, loaded))
    return not torch.equal(one.to(other.device), other)


def _check_plain(name: str, parameter: torch.Tensor) -> None:
    """Raises UsageError unless `parameter` is a plain tensor with values: only those
    are streamed."""
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
    """The end of a message about a module whose weights are buffers; empty if it has
    none."""
    nbytes = sum(buffer.nbytes for buffer in module.buffers())
    if not nbytes:
        return ""
    return (
        f": its {nbytes:,} bytes are buffers, as quantised modules keep them, which "
        "are not streamed; take it as it was before it was quantised"
    )


def spill(module: nn.Module, dtype: str, cache: Path) -> Spilled:
    """Writes the parameters of `module` to a safetensors file in a new folder in
    `cache`.

    The folder is removed when the parameters are put back. Floating parameters are cast
    to `dtype` when they are streamed, unless it is "auto". The module itself is not
    changed yet. Raises OutputError if the disk is full, and UsageError if there are no
    parameters to stream.
    """
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    tensors: dict[str, torch.Tensor] = {}
    first_of: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        _check_plain(name, parameter)
        first = first_of.setdefault(id(parameter), name)
        owner, _, key = name.rpartition(".")
        places.setdefault(first, []).append((module.get_submodule(owner), key))
        tensors[first] = parameter.detach()
    if not tensors:
        raise UsageError(
            f"{type(module).__name__} has no parameters to stream{_in_buffers(module)}"
        )
    residues = {name: residue_of(tensor) for name, tensor in tensors.items()}
    folder = SpillFolder(cache, _PREFIX)
    try:
        # Under another name first: a file with the final name is complete.
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
        places,
        {name: parameters[name].requires_grad for name in tensors},
        residues,
        {n: p.stride() for n, p in parameters.items() if not p.is_contiguous()},
    )


def _strided(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """A copy of `tensor`, on the CPU, with the strides `stride`."""
    found = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device="cpu")
    return found.copy_(tensor)
