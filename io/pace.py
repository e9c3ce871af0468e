"""Holds a link to a stated speed: to leave room on it, or to try out a slower one."""


class Pace:
    """When transfers over a link of `bytes_per_second` end, and `latency_seconds` late.

    One at a time: the next begins when the one before it has passed.
    """

    def __init__(self, *, bytes_per_second: float, latency_seconds: float) -> None:
        assert bytes_per_second > 0, "a link that moves nothing ends nothing"
        self._bytes_per_second = bytes_per_second
        self._latency_seconds = latency_seconds
        self._free_at = float("-inf")

    def end_of(self, nbytes: int, now: float) -> float:
        """The time at which `nbytes` that are given `now` have arrived."""
        self._free_at = max(now, self._free_at) + nbytes / self._bytes_per_second
        return self._free_at + self._latency_seconds
