"""The tree of errors: each type says who failed, each message names the fix.

PenstockError
├── UsageError               you asked for something that is not there (exit code 2)
│   ├── PolicyError          a key, unit or value of the policy
│   └── InputError           the file of rows to work on
├── CheckpointError          the checkpoint on disk is wrong (exit code 2)
│   └── CheckpointChangedError   it changed while it was being streamed
├── ReadError                the device below failed to read (exit code 3)
├── OutputError              the results cannot be written (exit code 3)
├── DoesNotFitError          a budget is too small; names one that is enough (3)
├── MachineError             a budget exceeds what the machine has (exit code 3)
├── StoppedError             a signal ended the job; says how to resume (130, 143)
├── RanksError               ranks that share a model have lost each other (3)
├── FaultError               weights touched outside the working set, under `strict`
└── ClosedError              you used an object after you closed it
"""

MAX_MESSAGE_CHARACTERS = 1_900
"""Most characters of a message: a value from a file may be megabytes long."""


def readable(text: str) -> str:
    """Returns `text` as one line that is safe to print.

    Characters that control a terminal (escape sequences, line ends, right-to-left
    marks) or cannot be encoded (half of a surrogate pair) are escaped as in Python. The
    middle of a long text is left out.
    """
    if len(text) > MAX_MESSAGE_CHARACTERS:
        # Shorten before escaping, which adds characters.
        text = _shortened(text, 2 * MAX_MESSAGE_CHARACTERS)
    if not text.isprintable():
        text = "".join(
            one if one.isprintable() else one.encode("unicode_escape").decode()
            for one in text
        )
    return _shortened(text, MAX_MESSAGE_CHARACTERS)


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = most // 3  # the end of a message says how to fix it
    return f"{text[: most - end - 5]} ... {text[-end:]}"


def _readable_lines(sentences: tuple[object, ...]) -> tuple[str, ...]:
    """One line for each sentence, up to the length limit of all of them together."""
    lines: list[str] = []
    left = MAX_MESSAGE_CHARACTERS
    for number, sentence in enumerate(sentences):
        line = readable(str(sentence))
        if lines and len(line) + 1 > left:
            return (*lines, f"... and {len(sentences) - number} more")
        lines.append(line)
        left -= len(line) + 1
    return tuple(lines)


class PenstockError(Exception):
    """The base class of all errors that Penstock raises on purpose.

    The message is one sentence, or several, each on a line. It is short and safe to
    print, whatever it quotes; see `readable`.
    """

    exit_code = 3

    def __init__(self, *sentences: object) -> None:
        super().__init__(*_readable_lines(sentences))

    def __str__(self) -> str:
        return "\n".join(self.args)


class UsageError(PenstockError):
    """The caller asked for something that does not exist or does not make sense."""

    exit_code = 2


class PolicyError(UsageError):
    """A key, unit or value of the policy is wrong."""


class InputError(UsageError):
    """The file of input rows is wrong."""


class CheckpointError(PenstockError):
    """The checkpoint on disk is missing, truncated or contradicts itself."""

    exit_code = 2


class CheckpointChangedError(CheckpointError):
    """A checkpoint file changed while it was being streamed."""


class ReadError(PenstockError):
    """Reading a file failed; the message names the file, the offset and the unit."""


class OutputError(PenstockError):
    """Results cannot be written; results written before stay on disk."""


class DoesNotFitError(PenstockError):
    """A budget is too small; the message names the smallest one that is enough."""


class MachineError(PenstockError):
    """The policy asks for more than the machine has; the message says how much."""


class StoppedError(PenstockError):
    """A signal ended the job; results so far are kept."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.exit_code - 128)


class RanksError(PenstockError):
    """Ranks that share a model cannot go on together: one of them is gone, or runs
    something else than the others."""


class FaultError(PenstockError):
    """Streamed weights were touched while they were not in the working set."""


class ClosedError(PenstockError):
    """An object was used after its owner had closed it."""


def closed() -> ClosedError:
    """The error for the use of a closed model."""
    return ClosedError("this model was closed; load it again to use it")
