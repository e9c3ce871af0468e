"""Measures how fast one thread decodes quantised weights."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from ...io.codecs.codec import Codec
from ...io.codecs.codes import Codes
from ...io.codecs.compiled import CannotCompileError, compiled
from ...io.codecs.kernels import Kernels, ScaleBlocks
from ...io.codecs.lossless import Lossless
from ...io.codecs.scaled import Scaled
from ...io.codecs.tiles import TILES
from .measure import seconds_of

_ROWS, _COLUMNS = 512, 2048
_BLOCKS = {
    Codes.FLOAT8_E4M3: ScaleBlocks(128, 128),
    Codes.INT8: ScaleBlocks(1, _COLUMNS),
    Codes.INT4: ScaleBlocks(1, 128),
    Codes.FLOAT4_E2M1: ScaleBlocks(1, 32),
}
"""The blocks that are most usual."""


def decoding_bandwidth(cache: Path) -> dict[str, int]:
    """Stored bytes per second that one thread decodes to float32, by codec.

    Decodes as weights are while they are loaded: from the processor's cache into
    memory. `cache` is the folder for compiled kernels.
    """
    try:
        kernels: Kernels = compiled(cache / "compiled")
    except CannotCompileError:
        kernels = TILES
    target = torch.zeros(64 << 20)
    parts = torch.split(target, _ROWS * _COLUMNS)
    pieces = itertools.cycle([part.view(_ROWS, _COLUMNS) for part in parts])
    found = {}
    for codec, stored in _samples():
        decode = partial(_decode, codec, stored, pieces, kernels)
        nbytes = sum(tensor.nbytes for tensor in stored)
        found[codec.name] = round(nbytes / seconds_of(decode, least=10, most=50))
    return found


def _samples() -> Iterator[tuple[Codec, list[torch.Tensor]]]:
    """Each codec, with stored tensors of [rows, columns] zeros."""
    for codes, blocks in _BLOCKS.items():
        shape = _ROWS, _COLUMNS // codes.per_byte
        scales = torch.ones(blocks.grid((_ROWS, _COLUMNS)))
        yield Scaled(codes, blocks), [torch.zeros(shape, dtype=torch.uint8), scales]
    packed = torch.zeros(_ROWS, _COLUMNS + _COLUMNS // 2 + 2, dtype=torch.uint8)
    yield Lossless(_COLUMNS, has_escapes=False), [packed]


def _decode(
    codec: Codec,
    stored: list[torch.Tensor],
    pieces: Iterator[torch.Tensor],
    kernels: Kernels,
) -> None:
    codec.decode(stored, next(pieces), kernels)
