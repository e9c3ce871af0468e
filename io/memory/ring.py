"""A ring buffer: ranges are given back in the order they were taken. Pure."""

from collections import deque


class Ring:
    """Hands out contiguous ranges of `capacity` bytes, first in, first out."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._taken: deque[tuple[int, int]] = deque()

    def __repr__(self) -> str:
        used = sum(end - start for start, end in self._taken)
        return f"<Ring: {len(self._taken)} pieces, {used}/{self.capacity} bytes>"

    def __len__(self) -> int:
        return len(self._taken)

    def take(self, nbytes: int) -> int | None:
        """The offset of `nbytes` free bytes; None while older ranges are in the way."""
        assert 0 < nbytes <= self.capacity, f"{nbytes} never fit into {self.capacity}"
        if not self._taken:
            start = 0
        else:
            oldest, newest_end = self._taken[0][0], self._taken[-1][1]
            is_wrapped = self._taken[-1][0] < oldest
            if newest_end + nbytes <= (oldest if is_wrapped else self.capacity):
                start = newest_end
            elif not is_wrapped and nbytes <= oldest:
                start = 0
            else:
                return None
        self._taken.append((start, start + nbytes))
        return start

    def give_back(self) -> None:
        """Frees the oldest range."""
        self._taken.popleft()
