"""The lossless format: weights of bfloat16 in three quarters of their bytes.

For a weight `NAME` the files hold `NAME_lossless` (its rows, packed) and, where there
are any, `NAME_escapes`; see `PackedFloats`. transformers does not know them. So the
recipes are made for the weights that the files stand for, and are changed then: slices
of those weights become slices of the tensors that are there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from ...io.checkpoint.header import TensorEntry
from ...io.checkpoint.index import Checkpoint
from ...io.codecs.computed import Compute, Computed
from ...io.codecs.lossless import Lossless
from ...io.codecs.packed import columns_of
from ...io.codecs.tiles import TILES
from ...io.errors import CheckpointError, UsageError
from ...io.weights.recipe import Recipe, TensorSlice, View

ROWS, ESCAPES = "_lossless", "_escapes"
"""What is added to the name of a weight."""
SECTION = {"quant_method": "penstock", "format": "lossless", "version": 1}
"""The `quantization_config`."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """The stored tensors of one weight."""

    rows: TensorEntry
    escapes: TensorEntry | None
    codec: Lossless

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return (self.rows,) if self.escapes is None else (self.rows, self.escapes)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return (*self.rows.shape[:-1], self.codec.columns)

    @property
    def num_rows(self) -> int:
        return View.whole(self.rows.shape[:-1]).numel

    def part(self, start: int, target: View) -> TensorSlice:
        """The slice that fills `target` (two-dimensional) with the rows from `start`
        on, which is the first of a block, if there are escapes."""
        end, width = start + target.shape[0], self.rows.shape[-1]
        source = _lines(start, end, width)
        if self.escapes is None:
            return TensorSlice(self.rows, source, target, self.codec)
        size = self.codec.block_rows
        blocks = _lines(start // size, -(-end // size), self.escapes.shape[1])
        return TensorSlice(
            self.rows, source, target, self.codec, (self.escapes,), (blocks,)
        )

    def unpacked(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The whole weight, made of stored tensors given by their names."""
        flat = torch.empty(
            self.num_rows, self.codec.columns, dtype=torch.bfloat16, device="cpu"
        )
        parts = [stored[entry.name] for entry in self.entries]
        parts[0] = parts[0].reshape(self.num_rows, -1)
        self.codec.decode(parts, flat, TILES)
        return flat.view(self.shape)


class LosslessFiles:
    """The weights that the files of a lossless checkpoint stand for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError for stored tensors that do not go together."""
        entries = dict(checkpoint.entries)
        self._packed: dict[str, PackedWeight] = {}
        for name in [name for name in entries if name.endswith(ROWS)]:
            weight = name.removesuffix(ROWS)
            rows, escapes = entries.pop(name), entries.pop(weight + ESCAPES, None)
            packed = _packed(rows, escapes)
            if weight in entries:
                raise CheckpointError(
                    f"{rows.path}: {weight!r} is there, and {name!r} beside it: "
                    "convert the model again"
                )
            nbytes = View.whole(packed.shape).numel * torch.bfloat16.itemsize
            entries[weight] = replace(
                rows,
                name=weight,
                dtype=torch.bfloat16,
                shape=packed.shape,
                nbytes=nbytes,
            )
            self._packed[weight] = packed
        self.checkpoint = replace(checkpoint, entries=MappingProxyType(entries))
        """Describes the unpacked weights, which lie nowhere."""

    def recipes(self, unpacked: Mapping[str, Recipe]) -> dict[str, Recipe]:
        """Recipes of the same parameters, made of what the files hold."""
        made = {}
        for name, recipe in unpacked.items():
            slices = [found for part in recipe.slices for found in self._of(part)]
            made[name] = replace(recipe, slices=tuple(slices))
        return made

    def _of(self, part: TensorSlice) -> list[TensorSlice]:
        """What `part` becomes, if it is a part of a packed weight."""
        if not any(entry.name in self._packed for entry in part.entries):
            return [part]
        if isinstance(part.codec, Computed):
            return [self._computed(part, part.codec.compute)]
        packed = self._packed[part.entry.name]
        found = _matrices(part, packed.codec.columns)
        size = packed.codec.block_rows if packed.escapes is not None else 1
        if found and all(start % size == 0 for start, _ in found):
            return [packed.part(start, view) for start, view in found]
        name, view = part.entry.name, part.source
        return [self._computed(part, lambda them: view.on(them[name].reshape(-1)))]

    def _computed(self, part: TensorSlice, compute: Compute) -> TensorSlice:
        """The slice that `compute` makes of the whole weights of `part`."""
        named = {entry.name: self._packed.get(entry.name) for entry in part.entries}
        entries: list[TensorEntry] = []
        for entry in part.entries:
            packed = named[entry.name]
            entries += (entry,) if packed is None else packed.entries

        def made(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return compute(
                {
                    name: stored[name] if packed is None else packed.unpacked(stored)
                    for name, packed in named.items()
                }
            )

        first, *others = entries
        codec = Computed(tuple(entry.name for entry in entries), made)
        source = View.whole(first.shape)
        return TensorSlice(first, source, part.target, codec, tuple(others))


def is_lossless(config: Any) -> bool:
    """Whether a config has the section of a lossless checkpoint."""
    found = getattr(config, "quantization_config", None)
    return (
        isinstance(found, dict) and found.get("quant_method") == SECTION["quant_method"]
    )


def lossless_files(config: Any, checkpoint: Checkpoint) -> LosslessFiles | None:
    """The weights of a lossless checkpoint; None if it is none.

    The section is taken out of `config` then. Raises UsageError for one of a version
    that is not known.
    """
    if not is_lossless(config):
        return None
    found = config.quantization_config
    if any(found.get(key) != value for key, value in SECTION.items()):
        raise UsageError(
            f"{checkpoint.folder}/config.json: quantization_config is {found!r:.200}, "
            f"and this version reads {SECTION}: take a newer one, or convert the model "
            "again"
        )
    del config.quantization_config
    return LosslessFiles(checkpoint)


def _packed(rows: TensorEntry, escapes: TensorEntry | None) -> PackedWeight:
    """The weight of two stored tensors. Raises CheckpointError if they do not fit."""
    columns = columns_of(rows.shape[-1]) if len(rows.shape) > 1 else None
    if rows.dtype != torch.uint8 or columns is None:
        raise CheckpointError(
            f"{rows.path}: {rows.name!r} ({rows.dtype}, {list(rows.shape)}) holds no "
            "packed weight: copy it, or convert the model again"
        )
    packed = PackedWeight(rows, escapes, Lossless(columns, escapes is not None))
    num_blocks = -(-packed.num_rows // packed.codec.block_rows)
    if escapes is not None and (
        escapes.dtype != torch.int32
        or len(escapes.shape) != 2
        or escapes.shape[0] != num_blocks
    ):
        raise CheckpointError(
            f"{escapes.path}: {escapes.name!r} ({escapes.dtype}, "
            f"{list(escapes.shape)}) has not the {num_blocks} rows of int32 that go "
            f"with {rows.name!r}: copy it, or convert the model again"
        )
    return packed


def _matrices(part: TensorSlice, columns: int) -> list[tuple[int, View]]:
    """The two-dimensional parts of the target of `part`, each with the row of the
    weight where it begins; none if it is no range of whole rows."""
    source, target = part.source, part.target
    is_rows = source.is_contiguous and source.shape[-1:] == (columns,)
    if not is_rows or source.offset % columns:
        return []
    start = source.offset // columns
    if target.is_contiguous:
        shape = (source.numel // columns, columns)
        return [(start, View(target.offset, shape, (columns, 1)))]
    if len(target.shape) == 2:
        return [(start, target)]
    if len(target.shape) != 3:
        return []
    count, rows, _ = target.shape
    step, *strides = target.stride
    return [
        (
            start + i * rows,
            View(target.offset + i * step, (rows, columns), tuple(strides)),
        )
        for i in range(count)
    ]


def _lines(start: int, end: int, width: int) -> View:
    """The lines `start` ... `end` of a tensor whose lines have `width` elements."""
    return View(start * width, (end - start, width), (width, 1))
