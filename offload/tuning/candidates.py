"""The settings that `penstock tune` tries around a plan: one key changed at a time, or
the two for what is in flight. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .race import Settings

_STEP_BYTES = 64 << 20
_SLOWEST_READER = 0.5
"""The share of the best reader's speed below which a reader is not tried."""


@dataclass(frozen=True, slots=True)
class Around:
    """The plan that the search starts from."""

    values: Mapping[str, Any]
    """The values of its policy, by dotted key."""
    is_open: frozenset[str]
    """The keys that the user has not set."""
    micro_batch_key: str
    """The policy's key for how much one call of the model has."""
    in_flight_key: str
    """The policy's key for how much is in flight."""
    joins_products: bool
    """Whether matrix products of several micro-batches may be computed as one."""
    waits_for_links: bool
    """Whether links are busy for a good part of a pass, so that faster or fewer loads
    could pay."""
    is_compiled: bool
    readers: Mapping[str, float]
    """The bytes a second of each reader on this machine."""
    least_bytes: int
    """The least bytes of the working set."""


def candidates(around: Around) -> list[Settings]:
    """The settings to try, the most promising first. The start is not among them."""
    found: dict[Settings, None] = {}
    for changed in _all(around):
        settings = tuple(
            (key, value)
            for key, value in changed.items()
            if value != around.values.get(key)
        )
        if settings and all(key in around.is_open for key, _ in settings):
            found[settings] = None
    return list(found)


def _all(around: Around) -> Iterator[dict[str, Any]]:
    yield from _in_flight(around)
    if around.waits_for_links:
        yield from _memory(around)
        yield from _reading(around)
        ahead = around.values["lookahead"]
        yield {"lookahead": ahead + 1}
        yield {"lookahead": max(1, ahead - 1)}
    if around.joins_products and not around.is_compiled:
        is_off = around.values["coalesce"] == "off"
        yield {"coalesce": "auto" if is_off else "off"}


def _in_flight(around: Around) -> Iterator[dict[str, Any]]:
    """More and less in flight, wider and narrower micro-batches, and both."""
    each_key, all_key = around.micro_batch_key, around.in_flight_key
    each, total = around.values[each_key], around.values[all_key]
    each = min(each, total)
    for new_each, new_total in (
        (each * 2, total * 2),
        (each, total * 2),
        (each * 2, total),
        (max(1, each // 2), total),
        (each, total // 2),
        (max(1, each // 2), total // 2),
    ):
        if new_each <= new_total:
            yield {each_key: new_each, all_key: new_total}


def _memory(around: Around) -> Iterator[dict[str, Any]]:
    """Other sizes of the working set. A larger one fits only where the plan left
    room."""
    asked = around.values["device_memory"]
    for nbytes in (asked * 2, (asked + around.least_bytes) // 2, around.least_bytes):
        size = -(-nbytes // _STEP_BYTES) * _STEP_BYTES
        if size >= around.least_bytes and (size > asked or size <= 0.9 * asked):
            yield {"device_memory": size}
    kept = around.values["host_memory"]
    if kept:
        yield {"host_memory": kept // 2 // _STEP_BYTES * _STEP_BYTES or None}


def _reading(around: Around) -> Iterator[dict[str, Any]]:
    best = max(around.readers.values(), default=0.0)
    for reader, rate in around.readers.items():
        if rate >= _SLOWEST_READER * best:
            yield {"io.reader": reader}
    key = "io.depth" if around.values["io.reader"] == "libaio" else "io.threads"
    num = around.values[key]
    yield {key: num * 2}
    yield {key: max(1, num // 2)}


def widest(around: Around, tried: list[Settings]) -> int:
    """The most tokens (or sequences) in flight, in the start and in what is tried."""
    key = around.in_flight_key
    totals: list[int] = [dict(settings).get(key, 0) for settings in tried]
    start: int = around.values[key]
    return max([start, *totals])
