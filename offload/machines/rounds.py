"""How often a measurement is repeated, within a budget of time."""

import time
from collections.abc import Callable, Iterator

ROUNDS = 3
SECONDS = 4.0
"""For the rounds of one measurement: seven of them, with what they warm up and what the
drive takes, make a minute on two slow cores."""


def rounds(
    most: int = ROUNDS,
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[int]:
    """0, 1, ... below `most`: no other one begins that would end after `seconds`, going
    by those before. The first always does."""
    began = clock()
    for number in range(most):
        spent = clock() - began
        if number and spent + spent / number > seconds:
            return
        yield number
