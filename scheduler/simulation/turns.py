"""How long each visit takes, for all of its micro-batches together. Pure.

Micro-batch m begins to compute at time s(m). Its keys and values are requested when the
micro-batch before it begins, so s(m + 1) = s(m) + max(compute(m), transfer(m + 1)).
Therefore the length of a visit, from its first micro-batch on, does not depend on when
it begins.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .simulated import Floats, SimulatedLink, Traffic


@dataclass(frozen=True, slots=True)
class Turns:
    """The lengths of the visits of all passes. Arrays of shape (passes, units)."""

    compute: Floats
    """Seconds of computing."""
    to_last: Floats
    """Seconds from the start of the first micro-batch to that of the last."""
    last: Floats
    """Seconds that the last one computes."""
    first_late: Floats
    """Seconds of latency of the first one's keys and values: their delay less the time
    for which the link is busy with them."""
    first_in: Floats
    """Seconds for which the link is busy with those of the first micro-batch."""
    rest_in: Floats
    """Seconds for which the link is busy with those of the other micro-batches."""
    out: Floats
    """Seconds for which the link is busy with what all micro-batches write back."""
    bytes_in: Floats
    bytes_out: Floats


def turns(
    compute_seconds: ArrayLike,
    shape: tuple[int, int, int],
    *,
    kv: Traffic | None,
    link_in: SimulatedLink | None,
    link_out: SimulatedLink | None,
) -> Turns:
    """Computes the visits of a sweep of `shape` (passes, units, micro-batches)."""
    columns = np.zeros((9, *shape[:2]))
    into = outof = np.zeros(1)
    speed_in = speed_out = np.inf
    late = 0.0
    if kv is not None:
        assert link_in is not None, "the link that it names"
        assert link_out is not None, "the link that it names"
        into, outof = np.asarray(kv.bytes_in), np.asarray(kv.bytes_out)
        speed_in, speed_out = link_in.bytes_per_second, link_out.bytes_per_second
        late = link_in.latency_seconds
    for at, (busy, bytes_in, bytes_out) in enumerate(
        _passes(shape, np.asarray(compute_seconds), into, outof)
    ):
        transfer = bytes_in / speed_in
        there = np.where(transfer > 0, transfer + late, 0.0)
        beside = np.maximum(busy[:, :-1], there[:, 1:])
        columns[:, at] = (
            busy.sum(axis=1),
            beside.sum(axis=1),
            busy[:, -1],
            np.where(transfer[:, 0] > 0, late, 0),
            transfer[:, 0],
            transfer[:, 1:].sum(axis=1),
            bytes_out.sum(axis=1) / speed_out,
            bytes_in.sum(axis=1),
            bytes_out.sum(axis=1),
        )
        if not any(_changes(value) for value in (compute_seconds, into, outof)):
            columns[:] = columns[:, :1]
            break
    return Turns(*columns)


def _passes(shape: tuple[int, int, int], *values: Floats) -> Iterator[list[Floats]]:
    """Yields each of `values` pass by pass, in shape (units, micro-batches)."""
    whole = [np.broadcast_to(value, shape) for value in values]
    for at in range(shape[0]):
        yield [value[at] for value in whole]


def _changes(value: ArrayLike) -> bool:
    """Whether `value` differs from pass to pass."""
    array = np.asarray(value)
    return array.ndim == 3 and array.shape[0] > 1
