"""What is in a ring of pieces that several processes share, and what to do by it.

Pure: the arrays may lie in shared memory, but nothing here waits or locks. A process is
known by its seat, a number from 0. Sets of seats are numbers whose bit i is seat i.
"""

from enum import Enum, auto
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

MOST_SEATS = 62
EMPTY, CLAIMED, READY = range(3)
HEAD = np.dtype(
    [
        ("is_changing", np.int64),  # somebody writes the table, or died while it did
        ("attached", np.int64),  # seats that take part
        ("left", np.int64),  # seats that took part, and no longer do
        ("members", np.int64),  # those that began the present pass together
        ("waiting", np.int64),  # those that wait to begin the next one
        ("num_claims", np.int64),
        ("read_bytes", np.int64),  # from the drive, by all
        ("taken_bytes", np.int64),  # from the ring, by all
    ]
)
SLOT = np.dtype(
    [
        ("state", np.int64),
        ("file", np.int64, 2),
        ("offset", np.int64),
        ("nbytes", np.int64),
        ("owner", np.int64),  # the seat that reads the piece, or has read it
        ("number", np.int64),  # of its claim
        ("pending", np.int64),  # members that have not taken it yet
        ("pins", np.int64),  # seats that copy it at this moment
    ]
)


class Key(NamedTuple):
    """A piece: a byte range of a file."""

    file: tuple[int, int]
    """A digest of the file's path and stamp."""
    offset: int
    nbytes: int


class Do(Enum):
    """What a process does about a piece that it needs."""

    TAKE = auto()
    """Copy it from the slot, which is pinned until `taken`."""
    CLAIM = auto()
    """Read it, and put it into the slot, which is its own until `publish`."""
    WAIT = auto()
    """Another one reads it."""
    WAIT_FOR_ROOM = auto()
    """Not now: it may not read more, or all slots hold what others have yet to take."""
    READ_ALONE = auto()
    """Read it; nobody else wants it."""


class Answer(NamedTuple):
    do: Do
    slot: int = -1


class Table:
    """The table: `head` is one HEAD, `slots` some SLOTs."""

    def __init__(
        self, head: npt.NDArray[Any], slots: npt.NDArray[Any], num_seats: int
    ) -> None:
        assert 0 < num_seats <= MOST_SEATS, "each seat has a bit"
        self._head, self._slots = head, slots
        self._all = (1 << num_seats) - 1

    def __repr__(self) -> str:
        used = int((self._slots["state"] != EMPTY).sum())
        return f"<Table: {used}/{len(self._slots)} slots, members {self.members:b}>"

    @property
    def members(self) -> int:
        return int(self._head["members"])

    @property
    def attached(self) -> int:
        return int(self._head["attached"])

    @property
    def counts(self) -> tuple[int, int]:
        """Bytes that all have read from the drive, and that all have taken."""
        return int(self._head["read_bytes"]), int(self._head["taken_bytes"])

    # Seats.

    def attach(self, seat: int) -> None:
        """From now on the process of `seat` takes part; another one may have had the
        seat before."""
        self.bury(1 << seat)
        self._head["attached"] |= 1 << seat
        self._head["left"] &= ~(1 << seat)

    def bury(self, seats: int) -> None:
        """Ends all that `seats` had begun. Their processes touch the ring no more."""
        for name in ("attached", "members", "waiting"):
            self._head[name] &= ~seats
        self._head["left"] |= seats
        slots = self._slots
        slots["pins"] &= ~seats
        slots["pending"] &= ~seats
        is_theirs = (slots["state"] == CLAIMED) & ((seats >> slots["owner"]) & 1 == 1)
        slots["state"][is_theirs] = EMPTY

    # PassStarts.

    def is_in_step(self, seat: int, gone: int) -> bool:
        """Whether the process of `seat` and all others, but for `gone`, read the same
        pieces in turn."""
        is_member = bool(self.members >> seat & 1)
        return is_member and not self.attached & ~self.members & ~gone

    def arrive(self, seat: int) -> None:
        """The process of `seat` is at the start of a pass: it wants no more of the
        pieces that are in the ring for it."""
        self._head["waiting"] |= 1 << seat
        self._head["members"] &= ~(1 << seat)
        self._slots["pending"] &= ~(1 << seat)

    def depart(self, seat: int, *, is_first: bool, gone: int, is_patient: bool) -> bool:
        """Whether the process of `seat`, which has arrived, begins its pass now: when
        all others have arrived, too, or when it `is_patient` no more. All that wait
        then begin together.

        It does not wait for those of `gone`. In its first pass (`is_first`) it waits
        for seats that nobody has had so far, too.
        """
        head = self._head
        if not int(head["waiting"]) >> seat & 1:
            return True  # another one has begun the pass for all
        expected = self._all if is_first else self.attached
        expected &= ~int(head["left"]) & ~int(head["waiting"]) & ~gone
        if expected and is_patient:
            return False
        head["members"], head["waiting"] = head["waiting"], 0
        return True

    # Pieces.

    def find(self, key: Key) -> int:
        """The slot of a piece, or -1."""
        slots = self._slots
        is_it = (slots["state"] != EMPTY) & (slots["offset"] == key.offset)
        for slot in np.flatnonzero(is_it):
            found = slots[slot]
            if int(found["nbytes"]) == key.nbytes and tuple(found["file"]) == key.file:
                return int(slot)
        return -1

    def look(
        self, seat: int, key: Key, *, gone: int, is_patient: bool, may_read: bool
    ) -> Answer:
        """What the process of `seat` does to get a piece. It waits for nobody of
        `gone`, and for room only while it `is_patient`."""
        slot = self.find(key)
        if slot >= 0:
            found = self._slots[slot]
            if found["state"] == READY:
                found["pins"] |= 1 << seat
                return Answer(Do.TAKE, slot)
            owner = int(found["owner"])
            if owner != seat and not gone >> owner & 1:
                return Answer(Do.WAIT)
        if not may_read:
            return Answer(Do.WAIT_FOR_ROOM)
        others = self.members & ~(1 << seat) & ~gone
        if slot >= 0 or not others or not self.members >> seat & 1:
            return Answer(Do.READ_ALONE)
        slot = self._free(gone)
        if slot < 0 and is_patient:
            return Answer(Do.WAIT_FOR_ROOM)
        if slot < 0:
            slot = self._overrun(seat)
        if slot < 0:
            return Answer(Do.READ_ALONE)
        self._head["num_claims"] += 1
        number = int(self._head["num_claims"])
        self._slots[slot] = (CLAIMED, *key, seat, number, 0, 0)
        return Answer(Do.CLAIM, slot)

    def publish(self, seat: int, slot: int) -> None:
        """The piece that `seat` has claimed is in its slot."""
        found = self._slots[slot]
        assert found["state"] == CLAIMED, "only what is claimed is filled"
        assert found["owner"] == seat, "by the one who claimed it"
        found["state"] = READY
        found["pending"] = self.members & ~(1 << seat)
        self._head["read_bytes"] += found["nbytes"]

    def abandon(self, slot: int) -> None:
        """The piece that was claimed could not be read."""
        self._slots[slot]["state"] = EMPTY

    def taken(self, seat: int, slot: int) -> None:
        """The process of `seat` has copied the piece."""
        found = self._slots[slot]
        found["pins"] &= ~(1 << seat)
        found["pending"] &= ~(1 << seat)
        self._head["taken_bytes"] += found["nbytes"]

    def count_alone(self, nbytes: int) -> None:
        """Somebody has read so many bytes that are not in the ring."""
        self._head["read_bytes"] += nbytes

    def _free(self, gone: int) -> int:
        """A slot that nobody needs: an empty one, or the oldest that all members have
        taken. -1 if there is none."""
        slots = self._slots
        empty = np.flatnonzero(slots["state"] == EMPTY)
        if len(empty):
            return int(empty[0])
        wanted = slots["pending"] & (self.members & ~gone)
        return self._oldest((slots["pins"] == 0) & (wanted == 0))

    def _overrun(self, seat: int) -> int:
        """The oldest slot that others have not taken yet: they are out of step. -1 if
        there is none."""
        slots = self._slots
        is_own = slots["pending"] >> seat & 1
        slot = self._oldest((slots["pins"] == 0) & (is_own == 0))
        if slot >= 0:
            self._head["members"] &= ~slots["pending"][slot]
        return slot

    def _oldest(self, among: npt.NDArray[np.bool_]) -> int:
        found = np.flatnonzero(among & (self._slots["state"] == READY))
        if not len(found):
            return -1
        return int(found[np.argmin(self._slots["number"][found])])
