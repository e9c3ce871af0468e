"""Estimates how many rows are done and how long the rest takes, for people to read.
Pure.

The number of rows never decreases, and the time left does not jump.
"""

import math
from dataclasses import replace

from .samples import ResourceSample

_SMOOTH_SECONDS = 15.0
"""After this many seconds, two thirds of a new estimate have taken effect."""


class TimeLeft:
    """Follows the samples of one job, in their order."""

    def __init__(self) -> None:
        self._rows = 0.0
        self._left: float | None = None
        self._at = 0.0

    def follow(self, sample: ResourceSample) -> ResourceSample:
        """`sample` with rows that never decrease, and with `seconds_left`.

        `seconds_left` is None in the first pass over the weights, whose speed says
        little (caches are cold), and while the number of rows is not known.
        """
        most = math.inf if sample.num_rows is None else sample.num_rows
        self._rows = max(self._rows, min(sample.rows, most))
        seen = replace(sample, rows=self._rows)
        return replace(seen, seconds_left=self._smoothed(seen))

    def _smoothed(self, sample: ResourceSample) -> float | None:
        estimate, last = estimated_seconds_left(sample), self._left
        passed = sample.seconds - self._at
        self._at = sample.seconds
        if estimate is None or last is None or estimate == 0:
            self._left = estimate
        else:
            expected = max(0.0, last - passed)
            share = 1 - math.exp(-passed / _SMOOTH_SECONDS)
            self._left = expected + share * (estimate - expected)
        return self._left


def estimated_seconds_left(sample: ResourceSample) -> float | None:
    """The seconds left if the remaining rows are as fast as those of this stage; None
    if it is not known."""
    done = sample.rows - sample.rows_before
    if not sample.num_rows or done <= 0:
        return None
    left = max(0.0, sample.num_rows - sample.rows)
    if left and sample.is_first_pass:
        return None
    return sample.stage_seconds * left / done
