"""Decides how often a measurement is repeated, within a time limit."""

import time
from collections.abc import Callable, Iterator

ROUNDS = 3
SECONDS = 4.0
"""The time limit of one measurement. Seven measurements, their warm-up and the drive
together take a minute on two slow cores."""


def rounds(
    most: int = ROUNDS,
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[int]:
    """Yields 0, 1, ... below `most`.

    Stops before a round that would probably end after `seconds`, judged by the previous
    ones. The first round always runs.
    """
    began = clock()
    for number in range(most):
        spent = clock() - began
        if number and spent + spent / number > seconds:
            return
        yield number
