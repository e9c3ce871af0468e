"""A slot made from a stored image holds the parameters that files are read to."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import PAGE, open_reader

from checkpoints import same_bits
from penstock.io.devices.device import CpuDevice
from penstock.io.memory.arena import Arena
from penstock.io.weights.layout import layout
from penstock.io.weights.link import Link
from penstock.io.weights.loader import Loader
from penstock.io.weights.recipe import View
from penstock.io.weights.source import ResidentSource
from penstock.io.weights.stored_image import stored_image
from penstock.io.weights.transfer import packed, same_layout
from recipes import Example, examples, make


@pytest.mark.slow
@settings(max_examples=30)
@given(
    example=examples(max_side=90),
    max_gap_bytes=st.sampled_from([0, PAGE, 1 << 18]),
    is_packed=st.booleans(),
)
def test_every_parameter_is_what_safetensors_loads(
    example: Example, max_gap_bytes: int, is_packed: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = make(example, Path(folder))
        plan = layout(
            "unit",
            made.recipes,
            alignment=PAGE,
            memory_alignment=PAGE,
            tensor_alignment=64,
            max_gap_bytes=0,
        )
        slot = same_layout(plan)
        if is_packed:
            slot = packed(plan, alignment=512, max_gap_bytes=64)
        image = stored_image(
            "unit", made.recipes, slot, alignment=PAGE, max_gap_bytes=max_gap_bytes
        )
        whole = [e for e in made.checkpoint.entries.values() if e.nbytes]
        assert image.transfer.moved_bytes <= 2 * sum(e.nbytes for e in whole) * len(
            made.recipes
        )
        with (
            Arena(image.layout.nbytes) as kept,
            Arena(slot.nbytes) as target,
            open_reader("threads", made.checkpoint.stamps, PAGE, True) as reader,
        ):
            loader = Loader([image.layout], kept, reader, bounce_bytes=PAGE)
            loader.load(0, 0).wait()
            assert loader.statistics().bytes_copied == 0
            loader.close()
            transfers = {0: image.transfer}
            source = ResidentSource(kept, {0: 0})
            with Link(
                "host", source, transfers, target, CpuDevice(), pace=None
            ) as link:
                for byte in (0x00, 0xFF):  # whatever stood there before
                    target.view(0, target.nbytes)[:] = bytes([byte]) * target.nbytes
                    link.load(0, 0, ()).wait()
                    for placed in slot.tensors:
                        whole_view = View.whole(placed.shape)
                        nbytes = whole_view.numel * placed.dtype.itemsize
                        if nbytes:
                            flat = target.tensor(placed.offset, nbytes)
                            found = whole_view.on(flat.view(placed.dtype)).clone()
                            assert same_bits(found, made.wanted[placed.name])
