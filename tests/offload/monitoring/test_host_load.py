"""What other work on the machine took of a job's CPU time."""

from __future__ import annotations

import pytest

from penstock.offload.monitoring.host_load import CpuTimes, taken_elsewhere

BEGAN = CpuTimes(wall=100.0, own=7.0, idle=5000.0)


def after(seconds: float, *, own: float, idle: float) -> CpuTimes:
    return CpuTimes(
        wall=BEGAN.wall + seconds, own=BEGAN.own + own, idle=BEGAN.idle + idle
    )


@pytest.mark.parametrize(
    ("own", "idle", "taken"),
    [
        (20.0, 0.0, 0.0),  # all of two cores
        (12.0, 8.0, 0.0),  # what it left was free
        (10.0, 0.0, 0.5),  # the other half was not
        (10.0, 2.0, 0.4),
        (15.0, 600.0, 0.0),  # many more cores, most of them idle
        (20.4, 0.1, 0.0),  # clocks of two kinds
    ],
)
def test_what_was_neither_had_nor_idle_was_taken(
    own: float, idle: float, taken: float
) -> None:
    now = after(10.0, own=own, idle=idle)
    assert taken_elsewhere(BEGAN, now, 2) == pytest.approx(taken)


def test_no_time_at_all_is_nobodys() -> None:
    assert taken_elsewhere(BEGAN, BEGAN, 2) == 0.0


def test_the_clocks_go_on() -> None:
    first, second = CpuTimes.now(), CpuTimes.now()
    assert second.wall > first.wall
    assert second.own >= first.own
    assert second.idle >= first.idle
