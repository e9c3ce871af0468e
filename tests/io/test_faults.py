"""Whatever the storage does: no hang, no wrong byte, and the right error at once."""

from __future__ import annotations

import threading
from random import Random

import pytest
import torch

from checkpoints import random_tensor, write_checkpoint
from faults import PAGE, READERS, Faults, faulty_reader
from penstock.io.checkpoint.index import Checkpoint, open_checkpoint
from penstock.io.errors import ReadError
from penstock.io.memory.arena import Arena
from penstock.io.readers.reader import Reader
from penstock.io.weights.layout import TENSOR_ALIGNMENT, layout
from penstock.io.weights.loader import Loader
from penstock.io.weights.recipe import plain
from penstock.scheduler.slots.working_set import WorkingSet

pytestmark = pytest.mark.usefixtures("no_leaks")

NUM_UNITS = 5
NUM_SCHEDULES = 50
"""How many schedules run with each reader; a thousand with `--whole`."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Units of about two to seven pages, at offsets that are nobody's multiple."""
    tensors = {
        f"unit{unit}.{part}": random_tensor(
            torch.uint8, (PAGE * (unit + 1) // 2 + 700 * part + unit,), seed=unit + part
        )
        for unit in range(NUM_UNITS)
        for part in range(3)
    }
    folder = tmp_path_factory.mktemp("faults")
    return open_checkpoint(write_checkpoint(folder, tensors, num_shards=2))


class Visits:
    """Visits units in a random order as a model does, checking every byte."""

    def __init__(self, checkpoint: Checkpoint, reader: Reader, arena: Arena) -> None:
        self._entries = {
            unit: [
                entry
                for name, entry in checkpoint.entries.items()
                if name.startswith(f"unit{unit}.")
            ]
            for unit in range(NUM_UNITS)
        }
        self._layouts = [
            layout(
                f"unit{unit}",
                [plain(e, name=e.name, dtype=e.dtype) for e in entries],
                alignment=PAGE,
                memory_alignment=PAGE,
                tensor_alignment=TENSOR_ALIGNMENT,
                max_gap_bytes=0,
            )
            for unit, entries in self._entries.items()
        ]
        self._arena = arena
        self.loader = Loader(self._layouts, arena, reader, bounce_bytes=PAGE)
        self.working_set = WorkingSet(
            [plan.nbytes for plan in self._layouts],
            names=[plan.name for plan in self._layouts],
            capacity=arena.nbytes,
            load=self.loader.load,
            mark=lambda: None,
            needed=frozenset(range(NUM_UNITS)),
        )
        self.errors: list[ReadError] = []
        self.failed_units: list[int] = []

    def run(self, random: Random, num: int) -> None:
        order = [random.randrange(NUM_UNITS) for _ in range(num)]
        for unit, following in zip(order, [*order[1:], 0], strict=True):
            try:
                offset = self.working_set.acquire(unit)
            except ReadError as error:
                self.errors.append(error)
                self.failed_units.append(unit)
                continue
            self.working_set.prefetch([following])
            self.check(unit, offset)
            self.working_set.release(unit)

    def check(self, unit: int, offset: int) -> None:
        for entry, placed in zip(
            self._entries[unit], self._layouts[unit].tensors, strict=True
        ):
            with entry.path.open("rb") as file:
                file.seek(entry.offset)
                wanted = file.read(entry.nbytes)
            found = self._arena.view(offset + placed.offset, entry.nbytes)
            assert found == wanted, f"{placed.name} is wrong"

    def close(self) -> None:
        self.working_set.close()
        self.loader.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("errors", [0.0, 0.04])
@pytest.mark.parametrize(
    "num", [NUM_SCHEDULES, pytest.param(1000, marks=pytest.mark.whole)]
)
def test_no_schedule_of_faults_hangs_or_gives_a_wrong_byte(
    num: int, errors: float, name: str, checkpoint: Checkpoint
) -> None:
    seen = Faults(0, errors=0.0)
    num_errors = 0

    def run(seed: int) -> None:
        nonlocal num_errors
        faults = Faults(seed, errors=errors)
        with (
            Arena(12 * PAGE) as arena,
            faulty_reader(name, checkpoint.stamps, faults) as reader,
        ):
            visits = Visits(checkpoint, reader, arena)
            try:
                visits.run(Random(seed), 8)
            finally:
                visits.close()
        # Every error comes of a fault; a fault may strike what nobody waited for.
        assert len(visits.errors) <= len(faults.broken)
        for unit, error in zip(visits.failed_units, visits.errors, strict=True):
            assert f"'unit{unit}'" in str(error)
            assert "Input/output error" in str(error)
            assert any(str(path) in str(error) for path in checkpoint.stamps)
        num_errors += len(visits.errors)
        seen.num_short += faults.num_short
        seen.num_interrupted += faults.num_interrupted
        seen.broken += faults.broken

    failures: list[BaseException] = []

    def run_all() -> None:
        try:
            for seed in range(num):
                run(seed)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run_all, daemon=True)
    thread.start()
    thread.join(timeout=240)
    assert not thread.is_alive(), "a schedule hangs"
    if failures:
        raise failures[0]
    assert seen.num_short > num // 2  # the faults did happen
    assert seen.num_interrupted > num // 2
    assert bool(seen.broken) == bool(errors)
    assert bool(num_errors) == bool(errors)


@pytest.mark.parametrize("name", READERS)
def test_a_unit_that_failed_once_is_read_again(
    name: str, checkpoint: Checkpoint
) -> None:
    faults = Faults(3, errors=1.0)
    with (
        Arena(12 * PAGE) as arena,
        faulty_reader(name, checkpoint.stamps, faults) as reader,
    ):
        visits = Visits(checkpoint, reader, arena)
        try:
            visits.run(Random(0), 3)
            assert len(visits.errors) == 3
            faults._errors = 0.0
            visits.run(Random(0), 3)
            assert len(visits.errors) == 3
        finally:
            visits.close()
