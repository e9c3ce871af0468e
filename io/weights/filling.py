"""Fills memory with units that stay there, one behind the other."""

from collections.abc import Callable, Iterable, Mapping

from .load import Load


def side_by_side(sizes: Mapping[int, int]) -> tuple[dict[int, int], int]:
    """Places units of `sizes` (bytes) one behind the other.

    Returns the offset of each unit, and the bytes of all together.
    """
    offsets: dict[int, int] = {}
    nbytes = 0
    for unit, size in sizes.items():
        offsets[unit] = nbytes
        nbytes += size
    return offsets, nbytes


def grown_bytes(
    held_bytes: int, rooms: Mapping[int, int], sizes: Mapping[int, int]
) -> int:
    """The bytes of memory that holds units in `rooms` (bytes), `held_bytes` together,
    once they have `sizes`: those that outgrow their rooms get memory of their own."""
    own = (size for unit, size in sizes.items() if size > rooms[unit])
    return held_bytes + sum(own)


def fill(
    loads: Iterable[tuple[int, Callable[[], Load]]],
    progress: Callable[[int, int], None],
    *,
    total_bytes: int,
) -> None:
    """Starts all `loads`, then waits for each and reports it to `progress`.

    A load is given as (bytes, function that starts it). Raises what a load raises.
    When this returns or raises, no load is under way.
    """
    begun: list[tuple[int, Load]] = []
    try:
        for nbytes, start in loads:
            begun.append((nbytes, start()))
        done = 0
        for nbytes, load in begun:
            load.wait()
            done += nbytes
            progress(done, total_bytes)
    finally:
        for _, load in begun:
            load.wait_quietly()
