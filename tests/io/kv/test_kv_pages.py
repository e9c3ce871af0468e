"""Where the bytes of a layer buffer lie in a file, against one bytearray."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.io.kv.pages import FreeList, plan_append, spans

PAGE = 8
appends = st.lists(st.binary(min_size=0, max_size=40), max_size=12)


@given(appends, st.lists(st.integers(1, 5), min_size=1, max_size=9), st.data())
def test_appends_and_reads_are_those_of_one_long_string(
    pieces: list[bytes], pages: list[int], data: st.DataObject
) -> None:
    whole = b"".join(pieces)
    sizes = [num * PAGE for num in pages]
    while sum(sizes) < len(whole):
        sizes.append(PAGE)
    file = [bytearray(size) for size in sizes]
    written: list[tuple[int, int]] = []
    length, tail = 0, b""
    for new in pieces:
        plan = plan_append(length, len(new), PAGE)
        if plan.write_end > plan.write_start:
            block = tail + new[: plan.num_written]
            assert len(block) == plan.write_end - plan.write_start
            for span in spans(sizes, plan.write_start, plan.write_end):
                piece = block[span.position : span.position + span.nbytes]
                file[span.segment][span.offset : span.offset + span.nbytes] = piece
            written.append((plan.write_start, plan.write_end))
            tail = new[plan.num_written :]
        else:
            assert plan.num_written == 0
            tail += new
        length += len(new)
        assert len(tail) < PAGE
    # Whole pages, each written once, one after the other.
    assert all(start % PAGE == end % PAGE == 0 for start, end in written)
    assert [start for start, _ in written[1:]] == [end for _, end in written[:-1]]
    start = data.draw(st.integers(0, length))
    end = data.draw(st.integers(start, length))
    flushed = length - len(tail)
    found = bytearray(end - start)
    for span in spans(sizes, start, max(start, min(end, flushed))):
        part = file[span.segment][span.offset : span.offset + span.nbytes]
        found[span.position : span.position + span.nbytes] = part
    low = max(start, flushed)
    if low < end:
        found[low - start :] = tail[low - flushed : end - flushed]
    assert bytes(found) == whole[start:end]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=40))
def test_no_byte_of_a_file_has_two_owners(acts: list[tuple[bool, int]]) -> None:
    free, owned = FreeList(), dict[int, int]()
    for is_taken, num in acts:
        if is_taken or not owned:
            offset = free.take(num)
            others = [(o, o + n) for o, n in owned.items()]
            assert all(offset + num <= low or high <= offset for low, high in others)
            owned[offset] = num
        else:
            offset = sorted(owned)[num % len(owned)]
            free.give_back(offset, owned.pop(offset))
        assert free.end == max((o + n for o, n in owned.items()), default=0)
