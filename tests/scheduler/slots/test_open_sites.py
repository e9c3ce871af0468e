"""The site that a sweep serves makes room for a fault, if nobody is inside of it."""

from __future__ import annotations

import pytest

from penstock.io.errors import DoesNotFitError
from penstock.scheduler.slots.open_sites import OpenSites, Site
from penstock.scheduler.slots.working_set import WorkingSet


class Done:
    """A load that is finished."""

    ready = None

    def wait(self) -> None: ...

    def wait_quietly(self) -> None: ...


def opened() -> tuple[OpenSites, WorkingSet, list[str]]:
    """Two sites of a unit each, with room for one."""
    seen: list[str] = []

    def load(unit: int, offset: int, after: object) -> Done:
        seen.append(f"load {unit}")
        return Done()

    working_set = WorkingSet(
        [8, 8],
        names=["a", "b"],
        capacity=8,
        load=load,
        mark=lambda: None,
        needed=frozenset((0, 1)),
    )
    sites = OpenSites(
        [Site("a", (0,)), Site("b", (1,))],
        working_set,
        bind=lambda site, offsets: seen.append(f"bind {site}"),
        unbind=lambda site: seen.append(f"unbind {site}"),
    )
    return sites, working_set, seen


def test_a_site_that_nobody_runs_makes_room_and_comes_back() -> None:
    sites, working_set, seen = opened()
    sites.enter(0)
    with pytest.raises(DoesNotFitError):
        working_set.acquire(1)
    with sites.aside(0):
        assert not sites.is_open(0)
        working_set.acquire(1)
        working_set.release(1)
    assert sites.is_open(0)
    assert seen == ["load 0", "bind 0", "unbind 0", "load 1", "load 0", "bind 0"]
    sites.leave(0)


def test_a_site_in_which_somebody_is_stays_open() -> None:
    sites, working_set, _ = opened()
    sites.enter(0)
    sites.enter(0)
    with sites.aside(0), pytest.raises(DoesNotFitError):
        working_set.acquire(1)
    with sites.aside(None):
        assert sites.is_open(0)
