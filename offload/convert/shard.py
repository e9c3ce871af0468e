"""Writes one file of tensors, converted, in memory for a few rows of one of them."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...io.checkpoint.dtypes import STORED_DTYPES
from ...io.checkpoint.header import FileStamp, TensorEntry
from ...io.codecs.packed import block_rows_of, escapes, pack, row_bytes_of
from ...io.errors import CheckpointChangedError
from ...io.extent import align_up
from ...io.weights.recipe import View
from ..weights.lossless import ESCAPES, ROWS
from .schemes import NewTensor, Scheme, Unchanged

_CHUNK_NUMEL = 1 << 19
"""Elements that are converted at a time: they take about 20 times as many bytes."""
_FEW_COLUMNS = 256
"""Packing counts as many different exponents in each row, however short it is."""
_CHUNK_BYTES = 4 << 20
_ALIGNMENT = 8
"""Bytes: no dtype of torch needs more."""
_PAYS = 0.9
"""A packed weight that takes more of its bytes than this share is left as it is."""
_FAR = 1 << 53
"""An offset with as many digits as any has."""
_NAMES = {kind.torch: name for name, kind in STORED_DTYPES.items() if kind.torch}

Progress = Callable[[int], None]
"""Is told how many more bytes have been read."""


@dataclass(frozen=True, slots=True)
class Shard:
    """What becomes of the tensors of one file."""

    tensors: tuple[TensorEntry, ...]
    """In the order of the file."""
    converted: frozenset[str]
    scheme: Scheme | Unchanged

    def made_of(self, entry: TensorEntry) -> tuple[NewTensor, ...]:
        """What is stored for `entry`; of a packed weight without its escapes, which are
        known only once it has been read."""
        if entry.name not in self.converted:
            return (NewTensor(entry.name, entry.dtype, entry.shape),)
        if isinstance(self.scheme, Scheme):
            return self.scheme.tensors(entry)
        *outer, columns = entry.shape
        shape = (*outer, row_bytes_of(columns))
        return (NewTensor(entry.name + ROWS, torch.uint8, shape),)

    def names_for(self, entry: TensorEntry) -> list[str]:
        """The names of what may be stored for `entry`."""
        names = [made.name for made in self.made_of(entry)]
        if entry.name in self.converted and isinstance(self.scheme, Unchanged):
            names.append(entry.name + ESCAPES)
        return names

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored, without escapes."""
        return sum(
            made.nbytes for entry in self.tensors for made in self.made_of(entry)
        )

    @property
    def batches(self) -> Iterator[Sequence[TensorEntry]]:
        """The tensors in an order that keeps all that is stored aligned, without a gap:
        first those, one by one, that end at a multiple of 8 bytes; then the others
        together, sorted by the size of their elements; then packed ones."""
        late: list[TensorEntry] = []
        packed: list[TensorEntry] = []
        for entry in self.tensors:
            made = self.made_of(entry)
            sizes = [entry.nbytes, *(each.nbytes for each in made)]
            if not any(size % _ALIGNMENT for size in sizes):
                yield (entry,)
            elif made[0].name.endswith(ROWS) and entry.name in self.converted:
                packed.append(entry)
            else:
                late.append(entry)
        if late:
            yield late
        for entry in packed:
            yield (entry,)


def write_shard(
    shard: Shard, target: Path, stamp: FileStamp, progress: Progress
) -> None:
    """Writes `shard` to the file `target`, which is on the device when this returns.

    `stamp` is that of the file that is read. Raises CheckpointChangedError if it has
    changed, OSError if the file cannot be written.
    """
    path = shard.tensors[0].path if shard.tensors else None
    with target.open("wb") as output:
        writer = _Writer(shard, output.fileno(), progress)
        if path is not None:
            with path.open("rb") as source:
                writer.write(source.fileno())
                if not stamp.is_of(os.fstat(source.fileno())):
                    raise CheckpointChangedError(
                        f"{path} has changed while it was converted: run the same "
                        "command again"
                    )
        writer.write_header()
        os.fsync(output.fileno())


class _Writer:
    """Writes tensors one behind the other, and at last the header before them."""

    def __init__(self, shard: Shard, output: int, progress: Progress) -> None:
        self._shard = shard
        self._output = output
        self._progress = progress
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        likely = dict(self._header)
        for entry in shard.tensors:
            for made in shard.made_of(entry):
                likely[made.name] = _header_entry(made, _FAR)
            if entry.name in shard.converted and isinstance(shard.scheme, Unchanged):
                found = NewTensor(entry.name + ESCAPES, torch.int32, (_FAR, _FAR))
                likely[found.name] = _header_entry(found, _FAR)
        self._start = align_up(8 + len(json.dumps(likely)), _ALIGNMENT)
        self._end = self._start

    def write(self, source: int) -> None:
        for batch in self._shard.batches:
            offsets = self._placed(batch)
            for entry in batch:
                if entry.name not in self._shard.converted:
                    self._copy(source, entry, offsets[entry.name])
                elif isinstance(self._shard.scheme, Scheme):
                    self._quantise(source, entry, offsets, self._shard.scheme)
                else:
                    self._pack(source, entry)

    def write_header(self) -> None:
        text = json.dumps(self._header).encode()
        size = self._start - 8
        assert len(text) <= size, "more room was left for the header than it takes"
        self._put(size.to_bytes(8, "little") + text.ljust(size), 0)

    def _placed(self, batch: Sequence[TensorEntry]) -> dict[str, int]:
        """Where the tensors of `batch` are written, by their names."""
        found = [made for entry in batch for made in self._shard.made_of(entry)]
        if len(batch) > 1:
            found.sort(key=lambda made: -made.dtype.itemsize)
        return {made.name: self._place(made) for made in found}

    def _place(self, made: NewTensor) -> int:
        offset = self._end
        self._header[made.name] = _header_entry(made, offset - self._start)
        self._end += made.nbytes
        return offset

    def _copy(self, source: int, entry: TensorEntry, offset: int) -> None:
        for start in range(0, entry.nbytes, _CHUNK_BYTES):
            nbytes = min(_CHUNK_BYTES, entry.nbytes - start)
            self._put(self._read(source, entry, start, nbytes), offset + start)

    def _quantise(
        self, source: int, entry: TensorEntry, offsets: dict[str, int], scheme: Scheme
    ) -> None:
        numbers, scales, *shape = scheme.tensors(entry)
        positions = [offsets[numbers.name], offsets[scales.name]]
        for rows in self._rows(source, entry, 1):
            for i, made in enumerate(scheme.quantise(rows, entry)):
                self._put(_bytes(made), positions[i])
                positions[i] += made.nbytes
        for made_shape in shape:
            self._put(_bytes(torch.tensor(entry.shape)), offsets[made_shape.name])

    def _pack(self, source: int, entry: TensorEntry) -> None:
        """Packs a weight; copies it to the same place where packing does not pay."""
        (made,) = self._shard.made_of(entry)
        offset = position = self._end - made.nbytes
        blocks: list[torch.Tensor] = []
        for rows in self._rows(source, entry, block_rows_of(entry.shape[-1])):
            packed, found = pack(rows)
            blocks += found
            self._put(_bytes(packed), position)
            position += packed.nbytes
        beside = escapes(blocks)
        nbytes = made.nbytes + (0 if beside is None else beside.nbytes)
        if nbytes > _PAYS * entry.nbytes:
            del self._header[made.name]
            self._end = offset
            whole = NewTensor(entry.name, entry.dtype, entry.shape)
            self._copy(source, entry, self._place(whole))
            self._progress(-entry.nbytes)
        elif beside is not None:
            name = entry.name + ESCAPES
            there = NewTensor(name, torch.int32, tuple(beside.shape))
            self._put(_bytes(beside), self._place(there))

    def _rows(
        self, source: int, entry: TensorEntry, block: int
    ) -> Iterator[torch.Tensor]:
        """Some rows of a weight at a time, two-dimensional: whole blocks of them."""
        *outer, columns = entry.shape
        num_rows = View.whole(tuple(outer)).numel
        most = _CHUNK_NUMEL // max(columns, _FEW_COLUMNS)
        step = max(1, most // block) * block
        width = columns * entry.dtype.itemsize
        for start in range(0, num_rows, step):
            count = min(step, num_rows - start)
            content = self._read(source, entry, start * width, count * width)
            yield torch.frombuffer(content, dtype=entry.dtype).view(count, columns)

    def _read(
        self, source: int, entry: TensorEntry, start: int, nbytes: int
    ) -> bytearray:
        content = bytearray(nbytes)
        view, done = memoryview(content), 0
        while done < nbytes:
            found = os.preadv(source, [view[done:]], entry.offset + start + done)
            if not found:
                raise CheckpointChangedError(
                    f"{entry.path} ends before {entry.name!r} does: it has changed "
                    "while it was converted"
                )
            done += found
        self._progress(nbytes)
        return content

    def _put(self, content: bytes | bytearray | memoryview, offset: int) -> None:
        view, done = memoryview(content), 0
        while done < len(view):
            done += os.pwrite(self._output, view[done:], offset + done)


def _header_entry(made: NewTensor, start: int) -> dict[str, Any]:
    *outer, last = made.shape or (1,)
    packed = STORED_DTYPES[_NAMES[made.dtype]].packed
    return {
        "dtype": _NAMES[made.dtype],
        "shape": [*outer, last * packed] if made.shape else [],
        "data_offsets": [start, start + made.nbytes],
    }


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    content: Any = flat.numpy()
    return memoryview(content)
