"""What is loaded when, in terms of what comes before what: no times in it. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScheduledLoad:
    """A unit that is brought into a slot."""

    unit: int
    tick: int
    """When it is asked for: 2 v before visit v finds its unit there, 2 v + 1 once it
    has."""
    after: int
    """The visit whose end the bytes of its slot wait for; -1 if none."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A visit is one run of all micro-batches through one unit; visit v is to unit v
    modulo the number of units."""

    num_visits: int
    loads: tuple[ScheduledLoad, ...]
    """In the order in which they are asked for."""
    needs: tuple[int, ...]
    """Of each visit, the load (its index) that brings its unit."""
