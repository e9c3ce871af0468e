"""The front door: what libraries raise about something that a user gave becomes one
sentence, a PenstockError, with the original as its cause. What is wrong in our own code
is nobody's mistake but ours, and stays what it is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import MachineError, PenstockError, ReadError

_HOUSE = tuple(
    f"{Path(__file__).parent.parent / floor}{os.sep}"
    for floor in ("io", "scheduler", "offload")
)
"""Where our own code is: an environment may lie beside it."""
_USER_ERRORS = (OSError, RecursionError, UnicodeError)
"""What files and arguments cause, whosever code meets it."""
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""How torch says it, in a RuntimeError."""


@contextmanager
def about(
    what: str, error: type[PenstockError], *, fix: str = "", every: bool = False
) -> Iterator[None]:
    """Around calls of a library with `what` a user gave (a file, an argument): what it
    raises becomes `error`, which names `what` and says `fix`. An exception that our own
    code raises passes, unless `every`: where only the user's values can cause one."""
    try:
        yield
    except PenstockError:
        raise
    except BaseException as problem:
        if not isinstance(problem, Exception) and not is_panic(problem):
            raise
        if is_memory(problem):
            raise _no_memory(what) from problem
        if not (every or isinstance(problem, _USER_ERRORS) or not _is_own(problem)):
            raise
        end = f"; {fix}" if fix else ""
        raise error(f"{what}: {in_words(problem)}{end}") from problem


@contextmanager
def front_door() -> Iterator[None]:
    """Around what a user calls: whatever files and memory do to it is one sentence."""
    try:
        yield
    except PenstockError:
        raise
    except OSError as problem:
        raise ReadError(in_words(problem)) from problem
    except (MemoryError, RuntimeError) as problem:
        if is_memory(problem):
            raise _no_memory("the process") from problem
        raise


def in_words(problem: BaseException) -> str:
    """What an exception says, as a part of a sentence: its first paragraph (what comes
    after is advice on how to use the library), and of which kind it is."""
    if isinstance(problem, OSError) and problem.strerror:
        name = f"{problem.filename}: " if problem.filename is not None else ""
        return f"{name}{problem.strerror}"
    text = " ".join(str(problem).strip()[:4_000].partition("\n\n")[0].split())
    kind = type(problem).__name__
    return f"{text.rstrip('.')} ({kind})" if text else kind


def is_panic(problem: BaseException) -> bool:
    """Whether it is what a library in Rust raises where it ought to have returned an
    error: no Exception, as Python has it."""
    return type(problem).__name__ == "PanicException"


def is_memory(problem: BaseException) -> bool:
    """Whether memory has run out."""
    if isinstance(problem, MemoryError):
        return True
    text = str(problem)[:2_000].lower() if isinstance(problem, RuntimeError) else ""
    return any(words in text for words in _NO_MEMORY)


def _no_memory(what: str) -> MachineError:
    return MachineError(
        f"{what}: memory ran out; lower the budgets of the policy, or end other "
        "processes"
    )


def _is_own(problem: BaseException) -> bool:
    """Whether it was raised by a line of this package."""
    trace = problem.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(_HOUSE)
