"""Windows cover what is wanted, are aligned, and hold nothing twice."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from penstock.io.extent import Extent, align_down, align_up, aligned, chunks, windows

MIB = 1 << 20
FILES = (Path("a"), Path("b"))
ALIGNMENTS = st.sampled_from([1, 8, 512, 4096])
EXTENTS = st.builds(
    Extent,
    st.sampled_from(FILES),
    st.integers(0, 40_000) | st.sampled_from([0, 511, 512, 513, 4095, 4096, 4097]),
    st.integers(0, 9_000) | st.sampled_from([0, 1, 512, 4096]),
)


@given(value=st.integers(0, 2**62), alignment=ALIGNMENTS)
def test_alignment_goes_to_the_nearest_multiple(value: int, alignment: int) -> None:
    down, up = align_down(value, alignment), align_up(value, alignment)
    assert down % alignment == up % alignment == 0
    assert down <= value <= up
    assert value - down < alignment
    assert up - value < alignment


@given(extent=EXTENTS, alignment=ALIGNMENTS)
def test_the_window_of_an_extent_is_the_smallest_aligned_one(
    extent: Extent, alignment: int
) -> None:
    window = aligned(extent, alignment)
    assert window.path == extent.path
    assert window.offset == align_down(extent.offset, alignment)
    assert window.end == align_up(extent.end, alignment)


@given(
    extents=st.lists(EXTENTS, max_size=12),
    alignment=ALIGNMENTS,
    max_gap_bytes=st.sampled_from([0, 1, 700, 4096, 10_000]),
)
def test_windows_cover_every_extent_and_never_overlap(
    extents: list[Extent], alignment: int, max_gap_bytes: int
) -> None:
    found = windows(extents, alignment=alignment, max_gap_bytes=max_gap_bytes)

    assert list(found) == sorted(found)
    members: dict[Extent, list[Extent]] = {window: [] for window in found}
    for extent in extents:
        holds = [
            window
            for window in found
            if window.path == extent.path
            and window.offset <= extent.offset
            and extent.end <= window.end
        ]
        if extent.nbytes:
            (window,) = holds  # in exactly one
            members[window].append(extent)
    for window, inside in members.items():
        # Tight: from the first extent's page to the last one's.
        assert window.offset == align_down(min(e.offset for e in inside), alignment)
        assert window.end == align_up(max(e.end for e in inside), alignment)
    for one, other in pairwise(found):
        if one.path == other.path:
            assert one.end + max_gap_bytes < other.offset


@given(
    extents=st.lists(EXTENTS, max_size=12),
    order=st.randoms(use_true_random=False),
    alignment=ALIGNMENTS,
)
def test_the_order_of_extents_does_not_matter(
    extents: list[Extent], order: Random, alignment: int
) -> None:
    shuffled = list(extents)
    order.shuffle(shuffled)
    assert windows(extents, alignment=alignment, max_gap_bytes=100) == windows(
        shuffled, alignment=alignment, max_gap_bytes=100
    )


@given(
    extents=st.lists(EXTENTS, min_size=1, max_size=12),
    alignment=ALIGNMENTS,
)
def test_no_gap_within_a_window_is_larger_than_allowed(
    extents: list[Extent], alignment: int
) -> None:
    max_gap_bytes = 2_000
    for window in windows(extents, alignment=alignment, max_gap_bytes=max_gap_bytes):
        inside = sorted(
            aligned(e, alignment)
            for e in extents
            if e.nbytes
            and e.path == window.path
            and window.offset <= e.offset < window.end
        )
        end = inside[0].end
        for extent in inside[1:]:
            assert extent.offset - end <= max_gap_bytes
            end = max(end, extent.end)


def test_neighbours_share_a_window_and_strangers_do_not() -> None:
    near = [Extent(FILES[0], 10, 20), Extent(FILES[0], 4100, 5)]
    far = [Extent(FILES[0], 20_000, 5), Extent(FILES[1], 30, 5)]
    assert windows(near + far, alignment=4096, max_gap_bytes=0) == (
        Extent(FILES[0], 0, 8192),
        Extent(FILES[0], 16384, 4096),
        Extent(FILES[1], 0, 4096),
    )
    joined = windows(near + far, alignment=4096, max_gap_bytes=8192)
    assert joined == (Extent(FILES[0], 0, 20480), Extent(FILES[1], 0, 4096))


@given(
    first_page=st.integers(0, 9),
    nbytes=st.integers(0, 40 * MIB) | st.sampled_from([0, 1, 4095, 4096, 4097]),
    max_chunk_bytes=st.sampled_from([1, 5000, 1 << 16, MIB, 8 * MIB, 1 << 40]),
    max_concurrency=st.integers(1, 9),
)
def test_chunks_are_the_extent_cut_in_order_into_aligned_equals(
    first_page: int, nbytes: int, max_chunk_bytes: int, max_concurrency: int
) -> None:
    extent = Extent(FILES[0], first_page * 4096, nbytes)
    found = list(
        chunks(
            extent,
            alignment=4096,
            max_chunk_bytes=max_chunk_bytes,
            max_concurrency=max_concurrency,
        )
    )
    position = extent.offset
    for chunk in found:
        assert chunk.path == extent.path
        assert chunk.offset == position
        assert chunk.offset % 4096 == 0
        assert 0 < chunk.nbytes <= max(max_chunk_bytes, 4096)
        position = chunk.end
    assert position == extent.end
    sizes = [chunk.nbytes for chunk in found]
    if found:
        assert max(sizes) - min(sizes) < 2 * 4096  # the last one may be cut, too
    if nbytes >= align_up(len(found), max_concurrency) * MIB:
        assert len(found) % max_concurrency == 0  # the lanes end together


def test_a_read_is_shared_out_among_the_lanes() -> None:
    def sizes(nbytes: int, max_concurrency: int) -> list[int]:
        extent = Extent(FILES[0], 0, nbytes)
        found = chunks(
            extent,
            alignment=4096,
            max_chunk_bytes=8 * MIB,
            max_concurrency=max_concurrency,
        )
        return [chunk.nbytes for chunk in found]

    assert sizes(9 * MIB, 2) == [9 * MIB // 2] * 2  # not 8 and 1
    assert sizes(24 * MIB, 2) == [6 * MIB] * 4
    assert sizes(24 * MIB, 1) == [8 * MIB] * 3
    assert sizes(MIB, 4) == [MIB]  # too small to be worth it
