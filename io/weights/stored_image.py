"""Plans how memory holds a unit as its files have it, and how its slot is made from
there. Pure.

A unit of quantised weights takes half or a quarter of its slot so, in memory and on
links. What is kept is the aligned windows of the files around all that the unit needs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..extent import Extent, windows
from .layout import Layout, Windows
from .recipe import Recipe
from .steps import Decode, LoadSteps, decode_of, raw_extent
from .transfer import Run, Transfer

IMAGE = Path("stored image")
"""Stands for the image where a decode names the file that it reads."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """The plan of one unit."""

    layout: Layout
    """How the image is read from files; it places no tensors."""
    transfer: Transfer
    """How the slot is made from the image: runs of bytes, and decodes whose inputs are
    ranges of the image."""


def stored_image(
    name: str,
    recipes: Sequence[Recipe],
    slot: Transfer,
    *,
    alignment: int,
    max_gap_bytes: int,
) -> StoredImage:
    """Plans the image of the unit `name`, whose parameters are made by `recipes` and
    lie in the slot as `slot` says.

    Windows begin and end at multiples of `alignment` bytes in their files and in the
    image; those at most `max_gap_bytes` apart are read as one.
    """
    placed = {tensor.name: tensor for tensor in slot.tensors}
    raw: list[tuple[Extent, int]] = []
    decodes: list[Decode] = []
    for recipe in recipes:
        base = placed[recipe.name].offset
        for part in recipe.slices:
            if not part.target.numel:
                continue
            extent = raw_extent(recipe, part)
            if extent is None:
                decodes.append(decode_of(recipe, part, base))
            else:
                offset = base + part.target.offset * recipe.dtype.itemsize
                raw.append((extent, offset))
    inputs = [each.extent for decode in decodes for each in decode.inputs]
    in_image = Windows(
        windows(
            (*(extent for extent, _ in raw), *inputs),
            alignment=alignment,
            max_gap_bytes=max_gap_bytes,
        )
    )
    nbytes = max(in_image.nbytes, alignment)
    stored_bytes = sum(recipe.stored_bytes for recipe in recipes)
    runs = (
        Run(in_image.offset_of(extent), offset, extent.nbytes) for extent, offset in raw
    )
    return StoredImage(
        Layout.of(name, nbytes, LoadSteps(in_image.reads), (), stored_bytes),
        replace(
            slot,
            runs=tuple(_joined(sorted(runs, key=lambda run: run.source_offset))),
            decodes=tuple(_moved(decode, in_image) for decode in decodes),
        ),
    )


def _moved(decode: Decode, in_image: Windows) -> Decode:
    """`decode`, with inputs that are ranges of the image."""
    inputs = tuple(
        replace(
            each,
            extent=Extent(IMAGE, in_image.offset_of(each.extent), each.extent.nbytes),
        )
        for each in decode.inputs
    )
    return replace(decode, inputs=inputs)


def _joined(runs: Iterable[Run]) -> Iterator[Run]:
    """Joins runs that go on where the one before ends, in the image and in the slot."""
    last: Run | None = None
    for run in runs:
        if last is not None and (
            run.source_offset == last.source_offset + last.nbytes
            and run.target_offset == last.target_offset + last.nbytes
        ):
            last = replace(last, nbytes=last.nbytes + run.nbytes)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last
