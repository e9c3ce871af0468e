"""Reads rows of an embedding table from its file, without loading the table."""

import mmap
import threading

import torch

from ...io.extent import Extent, windows
from ...io.readers.reader import Reader
from ...io.weights.recipe import Recipe


class RowGatherer:
    """Looks up rows of the table that `recipe` describes, one byte range of a file.

    Each distinct row is read once in a call. Rows that are close together are read
    together, at most `buffer_bytes` at a time. Several threads may call the model, and
    so this: no site that they wait for has such a table. One at a time reads.
    """

    def __init__(
        self, recipe: Recipe, reader: Reader, *, buffer_bytes: int, max_gap_bytes: int
    ) -> None:
        self.name = recipe.name
        self._lock = threading.Lock()
        self.read_from(recipe)
        self._reader = reader
        self._buffer_bytes = buffer_bytes
        self._max_gap_bytes = max_gap_bytes
        self._buffer = memoryview(b"")
        self.bytes_gathered = 0
        """Bytes of the rows that were returned; each distinct row of a call counts
        once."""

    def read_from(self, recipe: Recipe) -> None:
        """Called when the table's file changes: rows are read as `recipe` says from now
        on."""
        stored = recipe.stored_rows
        assert stored is not None, "a table that is not a byte range cannot be gathered"
        with self._lock:
            self._table = stored
            self._dtype = recipe.dtype
            self._stored_dtype = recipe.slices[0].entry.dtype
            self._num_rows, *row_shape = recipe.shape
            self._row_shape = tuple(row_shape)
            self._row_bytes = stored.nbytes // max(self._num_rows, 1)

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows `ids`, like `torch.embedding`.

        `ids` is int64 of any shape; the result is [*shape, dim] in the recipe's dtype,
        on the CPU. Raises IndexError for ids outside of the table, ReadError if reading
        fails.
        """
        distinct, inverse = torch.unique(ids, return_inverse=True)
        if len(distinct) and not 0 <= int(distinct[0]) <= int(distinct[-1]) < (
            self._num_rows
        ):
            raise IndexError(
                f"token ids {int(distinct[0])}..{int(distinct[-1])} reach outside of "
                f"the table's {self._num_rows} rows"
            )
        rows = torch.empty(
            (len(distinct), *self._row_shape), dtype=self._dtype, device="cpu"
        )
        step = max(1, self._buffer_bytes // (self._row_bytes + 2 * self._gap))
        with self._lock:
            for start in range(0, len(distinct), step):
                part = slice(start, start + step)
                self._read(distinct[part].tolist(), rows[part])
            self.bytes_gathered += len(distinct) * self._row_bytes
        return torch.embedding(rows, inverse)

    def close(self) -> None:
        """Frees the buffer; placeholders still refer to this object."""
        self._buffer = memoryview(b"")

    @property
    def _gap(self) -> int:
        return max(self._max_gap_bytes, self._reader.alignment)

    def _read(self, ids: list[int], rows: torch.Tensor) -> None:
        extents = [
            Extent(
                self._table.path,
                self._table.offset + row * self._row_bytes,
                self._row_bytes,
            )
            for row in ids
        ]
        reads = windows(
            extents, alignment=self._reader.alignment, max_gap_bytes=self._max_gap_bytes
        )
        total = sum(window.nbytes for window in reads)
        if len(self._buffer) < total:
            self._buffer = memoryview(mmap.mmap(-1, total))
        starts, handles, position = [], [], 0
        for window in reads:
            part = self._buffer[position : position + window.nbytes]
            handles.append(self._reader.submit(window, part, urgent=True))
            starts.append(position)
            position += window.nbytes
        for handle in handles:
            handle.wait_quietly()  # no read may write to the buffer after this
        for handle in handles:
            handle.wait()
        at = 0
        for row, extent in zip(rows, extents, strict=True):
            while extent.end > reads[at].end:
                at += 1
            start = starts[at] + extent.offset - reads[at].offset
            stored = self._buffer[start : start + self._row_bytes]
            row.copy_(
                torch.frombuffer(stored, dtype=self._stored_dtype).view(row.shape)
            )
