"""Ranks that read a part of each unit all get the bytes of the file."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
from gather_rig import NUM_UNITS, RigRank, UnitFile, run_ranks

from penstock.io.errors import PenstockError, RanksError
from penstock.offload.ranks import gathered_loads
from penstock.offload.ranks.gather_plan import GatherPlan

pytestmark = pytest.mark.usefixtures("no_leaks")
BLOCK = 4096


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> UnitFile:
    return UnitFile(tmp_path_factory.mktemp("units"))


def none_failed(found: list[Any]) -> None:
    for one in found:
        if isinstance(one, BaseException):
            raise one


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_parts_are_equal_and_together_each_byte_once(
    num_ranks: int, file: UnitFile
) -> None:
    for layout in file.layouts:
        plan = GatherPlan(layout, num_ranks)
        parts = [plan.part(rank) for rank in range(num_ranks)]
        assert [start for start, _ in parts] == [0, *(end for _, end in parts[:-1])]
        assert parts[-1][1] == plan.nbytes == sum(one.nbytes for one in plan.windows)
        sizes = [end - start for start, end in parts]
        assert max(sizes) - min(sizes) <= BLOCK
        for start, end in parts:
            extents = list(plan.extents(start, end))
            assert sum(one.nbytes for one in extents) == end - start
            places = [plan.find(one) for one in extents]
            assert places[:1] == [start][: len(places)]
        for read in layout.reads:
            assert plan.find(read.extent) is not None


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_each_rank_reads_its_part_of_each_unit_once_a_pass(
    num_ranks: int, file: UnitFile
) -> None:
    def work(one: RigRank) -> None:
        one.visit([*range(NUM_UNITS)] * 3)

    found, ranks = run_ranks(file, num_ranks, 0, work)
    none_failed(found)
    for one in ranks:
        plans = [GatherPlan(layout, num_ranks) for layout in file.layouts]
        parts = [plan.part(one.rank) for plan in plans]
        read = one.reader.statistics().bytes_read
        assert read <= 3 * sum(end - start for start, end in parts)
        assert read > 3 * sum(end - start - BLOCK for start, end in parts)


@pytest.mark.slow
def test_two_hundred_uneven_endings_hang_nowhere(file: UnitFile) -> None:
    """Ranks have other numbers of passes, some none, and end whenever they like; where
    they differ in the units that they need, too, each gets its own."""
    for seed in range(200):
        dice = random.Random(seed)
        num_ranks = dice.choice((2, 2, 3, 4))
        units = []
        for _ in range(num_ranks):
            visited = [*range(NUM_UNITS)] * dice.choice((0, 1, 2, 3))
            if seed % 4 == 0:
                visited = [one for one in visited if dice.random() < 0.7]
            units.append(visited)
        ahead = dice.choice((0, 1, 2))

        def work(one: RigRank, units: Any = units, ahead: int = ahead) -> None:
            one.visit(units[one.rank], ahead)

        none_failed(run_ranks(file, num_ranks, seed, work)[0])


def test_one_that_does_something_else_is_not_waited_for(
    file: UnitFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on reading for the others meanwhile, and joins them again."""
    monkeypatch.setattr(gathered_loads, "REST_SECONDS", 0.0)
    has_ended = threading.Event()

    def work(one: RigRank) -> None:
        one.visit([0, 1])
        if one.rank == 1:
            one.is_busy = False
            assert has_ended.wait(50)
            one.is_busy = True
            one.visit([2, 3])
        else:
            one.visit([2, 3, 4, 5])
            has_ended.set()

    none_failed(run_ranks(file, 2, 3, work)[0])


def test_one_that_waits_for_rows_is_not_waited_for(
    file: UnitFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathered_loads, "REST_SECONDS", 0.0)
    has_ended = threading.Event()

    def work(one: RigRank) -> None:
        if one.rank == 0:
            with one.loads.resting():
                assert has_ended.wait(50)
            one.visit([1, 2])
        else:
            one.visit([0, 1, 2])
            has_ended.set()

    none_failed(run_ranks(file, 2, 3, work)[0])


@pytest.mark.parametrize("failing", [0, 1])
def test_a_drive_that_fails_fails_the_load_on_all_ranks(
    failing: int, file: UnitFile
) -> None:
    def work(one: RigRank) -> None:
        if one.rank == failing:
            one.reader.first_failing = 4
        one.visit([*range(NUM_UNITS)])

    found, _ = run_ranks(file, 2, 0, work)
    for rank, error in enumerate(found):
        assert isinstance(error, PenstockError)
        assert "the drive is broken" in str(error)
        assert str(error).startswith("unit 'u")
        assert ("could not read its part" in str(error)) == (rank != failing)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_loads_of_the_others(
    killed: int, file: UnitFile
) -> None:
    def work(one: RigRank) -> None:
        one.visit([0, 1])
        if one.rank == killed:
            office = one.loads._post.office  # type: ignore[attr-defined]
            office.kill(killed)
            one.loads._post.mail.lose("it was killed")
            raise KeyboardInterrupt
        one.visit([2, 3])

    found, _ = run_ranks(file, 3, 0, work)
    for rank in {0, 1, 2} - {killed}:
        assert isinstance(found[rank], RanksError)
        assert f"rank {killed} is gone" in str(found[rank])
