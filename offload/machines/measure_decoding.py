"""Measures how fast one thread decodes quantised weights."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from ...io.codecs.codes import Codes
from ...io.codecs.compiled import CannotCompileError, compiled
from ...io.codecs.kernels import Kernels, ScaleBlocks
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
    for codes, blocks in _BLOCKS.items():
        codec = Scaled(codes, blocks)
        shape = _ROWS, _COLUMNS // codes.per_byte
        numbers = torch.zeros(shape, dtype=torch.uint8)
        scales = torch.ones(blocks.grid((_ROWS, _COLUMNS)))
        decode = partial(_decode, codec, [numbers, scales], pieces, kernels)
        nbytes = numbers.nbytes + scales.nbytes
        found[codec.name] = round(nbytes / seconds_of(decode, least=10, most=50))
    return found


def _decode(
    codec: Scaled,
    stored: list[torch.Tensor],
    pieces: Iterator[torch.Tensor],
    kernels: Kernels,
) -> None:
    codec.decode(stored, next(pieces), kernels)
