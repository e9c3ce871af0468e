"""What one process does about the pieces that it needs next. Pure: times are given."""

from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

from .pass_clock import Mode, PassClock
from .patience import START_SECONDS, late_seconds, poll_seconds, purse_after
from .pieces import Piece
from .table import Do, Table

_MOST_LOOKED_AT = 16


class Decision(NamedTuple):
    """What is done now, in this order."""

    read: list[Piece]
    """Begin to read these; into the ring, too, if they have a slot."""
    take: list[Piece]
    """Copy these from their slots, which are pinned."""
    is_waiting: bool
    """Whether the next piece waits until others have come as far."""


class InStep:
    """Decides for the process of `seat`, which has at most `most_reads` reads under way
    at a time."""

    def __init__(self, seat: int, most_reads: int, now: float) -> None:
        self._seat = seat
        self._most_reads = most_reads
        self._clock = PassClock(now)
        self._num_passes = 0
        self._longest_read = 0.0
        self.poll_seconds = poll_seconds(0.0)
        """How often it looks whether others have gone on."""
        self.purse = START_SECONDS
        """How many seconds it may still wait for others to come."""

    def __repr__(self) -> str:
        return f"<InStep: seat {self._seat}, {self.purse:.1f} s of patience>"

    def decide(
        self,
        table: Table,
        pieces: Iterable[Piece],
        *,
        num_reads: int,
        gone: int,
        now: float,
    ) -> Decision:
        """What to do about `pieces`, in the order in which they are needed, with
        `num_reads` reads under way. It waits for nobody of `gone`."""
        found = Decision([], [], False)
        is_patient = self.purse > 0
        for index, piece in enumerate(islice(pieces, _MOST_LOOKED_AT)):
            if piece.begins_pass:
                if index > len(found.read) + len(found.take):
                    break  # those of the last pass come first
                if not self._departs(table, piece, gone, now):
                    return found._replace(is_waiting=True)
            may_read = num_reads + len(found.read) < self._most_reads
            answer = table.look(
                self._seat,
                piece.key,
                gone=gone,
                is_patient=is_patient,
                may_read=may_read and not found.is_waiting,
            )
            if answer.do is Do.TAKE:
                piece.slot = answer.slot
                found.take.append(piece)
            elif answer.do is Do.CLAIM:
                piece.slot = answer.slot
                found.read.append(piece)
            elif answer.do is Do.READ_ALONE or (
                answer.do is Do.WAIT and may_read and self._is_late(piece, now)
            ):
                found.read.append(piece)
            elif answer.do is Do.WAIT_FOR_ROOM and may_read:
                found = found._replace(is_waiting=True)
        return found

    def note_read(self, seconds: float) -> None:
        """A read of a piece took so long."""
        self._longest_read = max(self._longest_read, seconds)
        self.poll_seconds = poll_seconds(seconds)

    def spend(self, *, is_idle: bool, is_waiting: bool, now: float) -> None:
        """Counts the time since the last call; from `now` on, the process wants nothing
        (`is_idle`), or all that it wants waits for others to come (`is_waiting`)."""
        mode = Mode.IDLE if is_idle else Mode.WAITING if is_waiting else Mode.BUSY
        self.purse -= self._clock.enter(mode, now)

    def _departs(self, table: Table, piece: Piece, gone: int, now: float) -> bool:
        """Whether the pass that begins with `piece` begins now."""
        if not piece.has_arrived:
            piece.has_arrived = True
            self._end_pass(table, now)
            if not table.is_in_step(self._seat, gone):
                table.arrive(self._seat)
        if not table.depart(
            self._seat,
            is_first=not self._num_passes,
            gone=gone,
            is_patient=self.purse > 0,
        ):
            return False
        piece.begins_pass = False
        self._num_passes += 1
        self.spend(is_idle=False, is_waiting=False, now=now)
        self._clock.begin(table.counts)
        return True

    def _end_pass(self, table: Table, now: float) -> None:
        self.spend(is_idle=False, is_waiting=False, now=now)
        if self._num_passes:
            last = self._clock.end(table.counts)
            is_first = self._num_passes == 1
            self.purse = purse_after(self.purse, last, is_first=is_first)

    def _is_late(self, piece: Piece, now: float) -> bool:
        """Whether another process has been reading `piece` for too long."""
        if piece.waits_since is None:
            piece.waits_since = now
        return now - piece.waits_since > late_seconds(self._longest_read)
