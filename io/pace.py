"""Limits the speed of a link, to leave bandwidth free or to simulate a slow link."""


class Pace:
    """Computes when transfers end on a link with this bandwidth and latency.

    Transfers run one after the other; each begins when the previous one has left the
    link.
    """

    def __init__(self, *, bytes_per_second: float, latency_seconds: float) -> None:
        assert bytes_per_second > 0, "a link that moves nothing ends nothing"
        self._bytes_per_second = bytes_per_second
        self._latency_seconds = latency_seconds
        self._free_at = float("-inf")

    def end_of(self, nbytes: int, now: float) -> float:
        """The time in seconds at which `nbytes` arrive if they are queued at `now`."""
        self._free_at = max(now, self._free_at) + nbytes / self._bytes_per_second
        return self._free_at + self._latency_seconds
