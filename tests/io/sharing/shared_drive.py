"""Workers that share a ring, on one drive, in simulated time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from penstock.io.extent import Extent
from penstock.io.handle import Handle
from penstock.io.sharing.in_step import InStep
from penstock.io.sharing.pieces import PassStarts, Piece
from penstock.io.sharing.table import HEAD, SLOT, Key, Table

FILE = Path("weights")
PIECE = 1000


def empty_table(num_slots: int, num_seats: int) -> Table:
    head = np.zeros((), HEAD)
    return Table(head, np.zeros(num_slots, SLOT), num_seats)


@dataclass
class Drive:
    """Reads pieces one after the other, each in `seconds`."""

    seconds: float
    free_at: float = 0.0
    num_read: int = 0

    def read(self, now: float) -> float:
        self.num_read += 1
        self.free_at = max(now, self.free_at) + self.seconds
        return self.free_at


@dataclass
class Worker:
    """Makes `num_passes` over `num_units` of `unit_pieces`; two units have room."""

    seat: int
    begins_at: float
    num_passes: int
    compute_seconds: float
    num_units: int = 12
    unit_pieces: int = 4
    pauses: dict[int, float] = field(default_factory=dict)
    """Seconds without any request before a pass, by its number."""
    ended_at: float | None = None
    num_taken: int = 0
    num_passes_done: int = 0

    def __post_init__(self) -> None:
        self.passes = PassStarts()
        self.open: deque[Piece] = deque()
        self.reading: list[tuple[float, Piece]] = []
        self.loads: deque[Handle] = deque()
        self.next_unit = 0
        self.computing_until: float | None = None
        self.done_units = 0
        self.free_at = self.begins_at
        self.is_attached = False

    @property
    def end(self) -> float:
        assert self.ended_at is not None, "it has ended"
        return self.ended_at

    def step(self, table: Table, drive: Drive, now: float) -> None:
        if now < self.begins_at or self.ended_at is not None:
            return
        if not self.is_attached:
            self.is_attached = True
            table.attach(self.seat)
            self.in_step = InStep(self.seat, 2, now)
        total = self.num_passes * self.num_units
        while self.next_unit < total and self.next_unit < self.done_units + 2:
            pause = 0.0
            if self.next_unit % self.num_units == 0:
                pause = self.pauses.get(self.next_unit // self.num_units, 0.0)
            if pause and self.done_units < self.next_unit:
                break
            if pause:
                self.pauses.pop(self.next_unit // self.num_units)
                self.free_at = now + pause
            if now < self.free_at:
                break
            self._request()
        for end, piece in list(self.reading):
            if end <= now:
                self.reading.remove((end, piece))
                if piece.slot >= 0:
                    table.publish(self.seat, piece.slot)
                else:
                    table.count_alone(PIECE)
                piece.handle.done()
        self._decide(table, drive, now)
        if self.computing_until is None and self.loads and self.loads[0].is_done:
            self.computing_until = now + self.compute_seconds
        if self.computing_until is not None and now >= self.computing_until:
            self.computing_until = None
            self.loads.popleft()
            self.done_units += 1
            self.num_passes_done = self.done_units // self.num_units
            if self.done_units == total:
                self.ended_at = now
                table.bury(1 << self.seat)

    def _request(self) -> None:
        unit = self.next_unit % self.num_units
        handle = Handle(self.unit_pieces)
        for index in range(self.unit_pieces):
            offset = (unit * self.unit_pieces + index) * PIECE
            key = Key((1, 2), offset, PIECE)
            begins = self.passes.begins(key)
            extent = Extent(FILE, offset, PIECE)
            self.open.append(Piece(extent, None, handle, key, begins))
        self.loads.append(handle)
        self.next_unit += 1

    def _decide(self, table: Table, drive: Drive, now: float) -> None:
        found = self.in_step.decide(
            table, self.open, num_reads=len(self.reading), gone=0, now=now
        )
        for piece in found.read:
            self.open.remove(piece)
            self.reading.append((drive.read(now), piece))
        for piece in found.take:
            self.open.remove(piece)
            table.taken(self.seat, piece.slot)
            self.num_taken += 1
            piece.handle.done()
        self.in_step.spend(
            is_idle=not self.open and not self.reading,
            is_waiting=found.is_waiting and not self.reading,
            now=now,
        )


def simulate(
    workers: Sequence[Worker],
    *,
    num_slots: int = 16,
    read_seconds: float = 0.1,
    tick: float = 0.02,
    most_seconds: float = 5000.0,
    is_shared: bool = True,
) -> Drive:
    """Runs the workers until all have ended. Without `is_shared`, each reads all."""
    own = [empty_table(num_slots, len(workers)) for _ in workers]
    for each in own:
        each.bury((1 << len(workers)) - 1)
    table, drive, now = empty_table(num_slots, len(workers)), Drive(read_seconds), 0.0
    while any(worker.ended_at is None for worker in workers):
        assert now < most_seconds, "nobody waits without an end"
        for worker in workers:
            worker.step(table if is_shared else own[worker.seat], drive, now)
        now += tick
    return drive
