"""The tree of errors: each type says who failed, each message names the fix.

PenstockError
├── UsageError               you asked for something that is not there (exit code 2)
│   ├── PolicyError          a key, unit or value of the policy
│   └── InputError           the file of rows to work on
├── CheckpointError          the checkpoint on disk is wrong (exit code 2)
│   └── CheckpointChangedError   it changed while it was being streamed
├── ReadError                the device below failed to read (exit code 3)
├── OutputError              the results cannot be written (exit code 3)
├── DoesNotFitError          a budget is too small; says the least that works (3)
├── MachineError             a budget is more than the machine has (exit code 3)
├── StoppedError             it was told to stop; says how to go on (130, 143)
├── FaultError               weights touched outside the working set, under `strict`
└── ClosedError              you closed it
"""


class PenstockError(Exception):
    """Root of every error Penstock raises on purpose."""

    exit_code = 3


class UsageError(PenstockError):
    """The caller asked for something that does not exist or does not make sense."""

    exit_code = 2


class PolicyError(UsageError):
    """A policy's key, unit or value."""


class InputError(UsageError):
    """The file of input rows."""


class CheckpointError(PenstockError):
    """The checkpoint on disk is missing, truncated or contradicts itself."""

    exit_code = 2


class CheckpointChangedError(CheckpointError):
    """A checkpoint file changed while it was being streamed."""


class ReadError(PenstockError):
    """The storage below failed; names file, offset and unit."""


class OutputError(PenstockError):
    """Results cannot be written; what was written before stays on disk."""


class DoesNotFitError(PenstockError):
    """A budget is too small; the message says the least that works."""


class MachineError(PenstockError):
    """More was asked for than the machine has; the message says how much that is."""


class StoppedError(PenstockError):
    """A signal ended the job; what is done of it is kept."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


class FaultError(PenstockError):
    """Streamed weights were touched while they were not in the working set."""


class ClosedError(PenstockError):
    """The object was closed by its owner."""
