"""How long a process waits for others, to go on in step with them. Pure.

Processes in step read each piece once for all of them. One that is ahead may wait for
the others, but what it waits must be paid for by what reading once has saved: so it is
never slower than without, except for one pass.
"""

from dataclasses import dataclass

START_SECONDS = 5.0
"""How long the first pass waits for the other processes to begin."""
_LATE_SECONDS = 10.0
"""The least time that another one has for the read of one piece."""
_LATE_READS = 4
_POLLS_OF_READ = 8
_SHORTEST_POLL, _LONGEST_POLL = 0.001, 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """What one pass of a process was."""

    seconds: float
    idle_seconds: float
    """In which it wanted nothing: the drive is not what limits it."""
    waited_seconds: float
    """In which it waited for others to come."""
    read_bytes: int
    """Bytes that all processes read from the drive meanwhile."""
    taken_bytes: int
    """Bytes that all processes took from others meanwhile, and would have read."""

    @property
    def busy_seconds(self) -> float:
        return max(0.0, self.seconds - self.idle_seconds - self.waited_seconds)


def saved_seconds(last: PassTimes, *, is_first: bool) -> float:
    """The time that a pass would have taken longer if each process had read all itself.

    What was taken would have come from the drive at the same rate. Time in which this
    process wanted nothing would have been used first. Nothing is known of the first
    pass: being in step later is trusted to be worth a pass.
    """
    busy = last.busy_seconds
    share = last.taken_bytes / last.read_bytes if last.read_bytes else 0.0
    saved = busy * (max(share, 1.0) if is_first else share)
    return max(0.0, saved - last.idle_seconds)


def purse_after(purse: float, last: PassTimes, *, is_first: bool) -> float:
    """The seconds that the next pass may wait, after a pass that left `purse` of those
    before. Not more than a pass takes: then the others do not come."""
    if is_first:
        purse = 0.0  # what was left of the time to begin
    saved = saved_seconds(last, is_first=is_first)
    return min(purse + saved, last.busy_seconds)


def late_seconds(longest_read: float) -> float:
    """How long a process waits for a piece that another one reads, if the longest of
    its own reads took `longest_read` seconds."""
    return max(_LATE_SECONDS, _LATE_READS * longest_read)


def poll_seconds(last_read: float) -> float:
    """How often a process looks whether others have read a piece, if its own last read
    took `last_read` seconds."""
    return min(max(last_read / _POLLS_OF_READ, _SHORTEST_POLL), _LONGEST_POLL)
