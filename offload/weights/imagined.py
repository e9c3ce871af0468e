"""Makes recipes of a model without files, as if a checkpoint had been published as its
config.json says: plain, or quantised."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...io.checkpoint.header import TensorEntry
from ...io.checkpoint.index import SINGLE_FILE
from ...io.extent import align_up
from ...io.readers.files import ALIGNMENT
from ...io.weights.recipe import Recipe, TensorSlice, plain
from .dtype_plan import DtypePlan
from .imagined_schemes import Part, PublishedScheme, scheme_of


def imagined_recipes(
    model: PreTrainedModel,
    folder: Path,
    stored: torch.dtype,
    computed: torch.dtype,
    quantizer: Any,
    compressed: Any,
    left_out: tuple[str, ...],
) -> dict[str, Recipe]:
    """The recipes of `model` (on meta), which computes in the dtype `computed`, by the
    names of its tensors; tied ones occur once.

    Tensors that are not quantised have the dtype `stored`, or their own where that is
    another one than `computed`. `quantizer` is transformers' own, `compressed` are the
    settings of compressed-tensors; None without them.
    `left_out` are the modules that are not quantised, beside those that it names.

    Stacked experts are one stored tensor, whose rows are those of all experts: their
    bytes are those of a checkpoint, their number of tensors is not.
    """
    dtypes, tied = DtypePlan(model, computed), set(model.all_tied_weights_keys)
    scheme = scheme_of(model, quantizer, compressed, stored, left_out)
    files = _Files(folder / SINGLE_FILE)
    found: dict[str, Recipe] = {}
    state: dict[str, torch.Tensor] = model.state_dict()
    for name, tensor in state.items():
        if name in tied:
            continue
        shape, dtype = tuple(tensor.shape), dtypes.of(name, tensor)
        if scheme is not None and scheme.covers(name, shape):
            found[name] = _quantised(name, shape, dtype, scheme, files)
        else:
            kept = stored if tensor.dtype == computed else tensor.dtype
            entry = files.add(name, Part(kept, shape))
            found[name] = plain(entry, name=name, dtype=dtype)
    return found


def _quantised(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    scheme: PublishedScheme,
    files: "_Files",
) -> Recipe:
    """The recipe of a weight, or of a stack of them, that `scheme` quantises."""
    owner, _, key = name.rpartition(".")
    slices: list[TensorSlice] = []
    kind = scheme.format_of(len(shape) == 3)
    for target, parts in scheme.stored(key, shape):
        entries = {part: files.add(f"{owner}.{part}", p) for part, p in parts.items()}
        slices += kind.slices(entries, target)
    return Recipe(name, shape, dtype, tuple(slices))


class _Files:
    """One file, whose tensors lie one behind the other, each at the start of a page.
    So equal blocks lie in the same way, and are planned once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = ALIGNMENT

    def add(self, name: str, part: Part) -> TensorEntry:
        nbytes = math.prod(part.shape) * part.dtype.itemsize
        entry = TensorEntry(
            name, part.dtype, part.shape, self._path, self._offset, nbytes
        )
        self._offset = align_up(self._offset + nbytes, ALIGNMENT)
        return entry
