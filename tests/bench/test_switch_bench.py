"""The benchmark of ranks that divide products or gather weights: its arithmetic."""

from __future__ import annotations

import time

import pytest

from ranks.paced_peers import PacedSocket
from ranks.switch import turn


def test_the_turn_is_between_the_points_where_the_faster_one_changes() -> None:
    many = dict.fromkeys((32, 64, 128), 1.0)
    assert turn({32: 0.5, 64: 0.5, 128: 2.0}, many) == pytest.approx(64 * 2**0.5)
    assert turn({32: 0.5, 64: 0.5, 128: 0.9}, many) is None
    assert turn({32: 1.5, 64: 2.0, 128: 3.0}, many) is None  # it is before the first


class Sink:
    """A socket that takes all at once."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def send(self, data: memoryview) -> int:
        self.num_bytes += len(data)
        return len(data)


@pytest.mark.slow
def test_a_paced_socket_takes_no_more_than_its_rate() -> None:
    sink = Sink()
    paced = PacedSocket(sink, 1e6)  # type: ignore[arg-type]
    left, start = memoryview(bytes(300_000)), time.perf_counter()
    while left:
        left = left[paced.send(left) :]
    assert sink.num_bytes == paced.num_bytes == 300_000
    assert time.perf_counter() - start >= 0.3
