"""What ranks send to each other. Pure."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from .stages import NO_CALL, Address


class Kind(IntEnum):
    """What a message says."""

    OUTPUT = 0
    """The output of a call, or what the head's owner has computed."""
    ERROR = 1
    """A call has failed; the micro-batch may go on after that."""
    FAILED = 2
    """A micro-batch has ended with an error."""
    DONE = 3
    """A micro-batch has ended."""
    STARTED = 4
    """The first rank has started the next micro-batch."""
    EXHAUSTED = 5
    """The first rank has no more micro-batches."""
    LEFT = 6
    """A rank has left a run before its end."""
    SHARED = 7
    """A value that all ranks take from the first one."""
    BYE = 8
    """A rank has closed its model."""
    ALIVE = 9
    """Nothing but that the sender is there."""
    ASK = 10
    """What a rank that gathers wants to load: `stage` is the unit, `fingerprint` an
    `Ask`."""
    LOAD = 11
    """What is loaded next: `stage` is the unit, `address.micro_batch` the number of the
    load, and `text` has the ranks that want it."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. What its kind does not need is left at its default."""

    kind: Kind
    address: Address = NO_CALL
    stage: int = 0
    """The stage whose output it is; for STARTED, the lap."""
    fingerprint: int = 0
    text: str = ""
    """The words of an error; for SHARED, JSON. For OUTPUT, what was returned in a
    tuple: "t" for a tensor, "-" for another value; before that "[" for a list; "" for
    a tensor alone."""
    tensor: Any = None
    """In host memory; on its way there (a `HostCopy`) while the message is sent."""
