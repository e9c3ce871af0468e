"""Compares kernels with those in torch on a few numbers."""

from typing import Any

import torch

from .codes import Codes
from .kernels import Kernels, ScaleBlocks, ScaledNumbers
from .packed import PackedFloats, block_rows_of, escapes, pack
from .tiles import TILES


def fault_of(kernels: Kernels) -> str | None:
    """What `kernels` make otherwise than torch: a sentence; None if nothing."""
    for codes, rounding, dtype in (
        (Codes.FLOAT8_E4M3, torch.float32, torch.bfloat16),
        (Codes.INT4, torch.bfloat16, torch.float32),
        (Codes.INT8, torch.float16, torch.float16),
        (Codes.FLOAT4_E2M1, torch.float32, torch.float32),
    ):
        columns = 202  # no block of 41 begins where a word of 8 halves does
        blocks = ScaleBlocks(2, 41)
        draw: dict[str, Any] = {  # whatever torch's defaults are
            "generator": torch.Generator("cpu").manual_seed(0),
            "device": "cpu",
        }
        grid = blocks.grid((5, columns))
        numbers = ScaledNumbers(
            torch.randint(
                0, 127, (5, columns // codes.per_byte), dtype=torch.uint8, **draw
            ),
            codes,
            blocks,
            torch.rand(grid, dtype=torch.float32, **draw),
            torch.rand(grid, dtype=torch.float32, **draw),
            rounding,
        )
        for turned in (False, True):
            found, wanted = (
                torch.empty(columns, 5, dtype=dtype, device="cpu").t()
                if turned
                else torch.empty(5, columns, dtype=dtype, device="cpu")
                for _ in range(2)
            )
            kernels.write_scaled(found, numbers)
            TILES.write_scaled(wanted, numbers)
            if not torch.equal(found, wanted):
                return f"compiled loops make other bits of {codes.value} than torch"
    return _fault_of_packed(kernels)


def _fault_of_packed(kernels: Kernels) -> str | None:
    """The same for packed numbers."""
    columns = 203
    bits = torch.randint(
        -(1 << 15),
        1 << 15,
        (5, columns),
        dtype=torch.int16,
        generator=torch.Generator("cpu").manual_seed(0),
        device="cpu",
    )
    made, blocks = pack(bits.view(torch.bfloat16))
    numbers = PackedFloats(made, columns, escapes(blocks), block_rows_of(columns))
    for dtype, kind in ((torch.bfloat16, torch.int16), (torch.float32, torch.int32)):
        found, wanted = (
            torch.empty(5, columns, dtype=dtype, device="cpu") for _ in range(2)
        )
        kernels.write_packed(found, numbers)
        TILES.write_packed(wanted, numbers)
        if not torch.equal(found.view(kind), wanted.view(kind)):
            return "compiled loops make other bits of packed bfloat16 than torch"
    return None
