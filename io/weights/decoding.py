"""Cuts a decode into parts that fit a bounce buffer. Pure."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ..extent import Extent
from .recipe import View
from .steps import Decode, Input


def parts_of(
    decode: Decode, target: torch.Tensor, max_bytes: int
) -> Iterator[tuple[Sequence[Input], torch.Tensor]]:
    """Cuts `decode` into ranges of rows that read at most about `max_bytes` each.

    Yields what each range reads, and the rows of `target` that it writes. A range is
    whole rows of all inputs; where each element is decoded by itself, it need not be.
    The whole decode is one part if an input with rows is strided.
    """
    inputs, rows_each = decode.inputs, decode.codec.rows_each
    cut = [each for each, rows in zip(inputs, rows_each, strict=True) if rows]
    is_strided = any(not each.view.is_contiguous for each in cut)
    if not cut or is_strided or decode.stored_bytes <= max_bytes:
        yield inputs, target
        return
    if decode.codec.is_elementwise and decode.target.is_contiguous:
        inputs = tuple(replace(i, view=View.whole((i.view.numel,))) for i in inputs)
        target = target.reshape(-1)
    num_rows = target.shape[0]
    block = math.lcm(*(rows for rows in rows_each if rows))
    num_blocks = -(-num_rows // block)
    whole_bytes = decode.stored_bytes - sum(each.extent.nbytes for each in cut)
    block_bytes = -(-(decode.stored_bytes - whole_bytes) // num_blocks)
    num_parts = -(-num_blocks // max(1, (max_bytes - whole_bytes) // block_bytes))
    step = -(-num_blocks // num_parts) * block  # parts of nearly equal size
    for start in range(0, num_rows, step):
        end = min(start + step, num_rows)
        ranges = [
            _rows(each, start // rows, -(-end // rows)) if rows else each
            for each, rows in zip(inputs, rows_each, strict=True)
        ]
        yield ranges, target[start:end]


def _rows(each: Input, start: int, end: int) -> Input:
    """The rows `start` ... `end` of a contiguous input."""
    row = View.whole(each.view.shape[1:]).numel * each.dtype.itemsize
    extent = Extent(
        each.extent.path, each.extent.offset + start * row, (end - start) * row
    )
    return Input(extent, each.dtype, View.whole((end - start, *each.view.shape[1:])))
