"""The order in which units are loaded and used, without times. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScheduledLoad:
    """The load of one unit into a slot."""

    unit: int
    tick: int
    """When it is requested: 2 v is before visit v has its unit, 2 v + 1 after that."""
    after: int
    """The visit that must have ended before its slot may be written; -1 if none."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The loads of a sweep. A visit is one run of all micro-batches through one unit;
    visit v uses unit v modulo the number of units."""

    num_visits: int
    loads: tuple[ScheduledLoad, ...]
    """In the order in which they are requested."""
    needs: tuple[int, ...]
    """For each visit, the index of the load that loads its unit."""
