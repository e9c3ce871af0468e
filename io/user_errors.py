"""Turns errors caused by a user's files and values into PenstockErrors of one sentence.

The original error becomes the cause. Errors of Penstock's own code are bugs, and are
passed on unchanged.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import MachineError, PenstockError, ReadError

_OWN_FOLDERS = tuple(
    f"{Path(__file__).parent.parent / floor}{os.sep}"
    for floor in ("io", "scheduler", "offload")
)
"""The folders of Penstock's code. A virtual environment may be next to them."""
_USER_ERRORS = (OSError, RecursionError, UnicodeError)
"""Errors that files and arguments cause, whichever code raises them."""
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""Words of torch's RuntimeErrors when memory runs out."""


@contextmanager
def about(
    what: str, error: type[PenstockError], *, fix: str = "", every: bool = False
) -> Iterator[None]:
    """Use it around calls of a library with something a user gave, such as a file.

    What the library raises becomes `error`, which names `what` and ends with `fix`.
    Exceptions of Penstock's own code pass unchanged, unless `every` is set. Set it if
    only the user's values can cause an exception.
    """
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
def user_errors() -> Iterator[None]:
    """Use it around public calls: errors of files and memory become one sentence."""
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
    """The message and type of an exception, as a part of a sentence.

    Only the first paragraph is used: what follows is advice on how to use the library.
    """
    if isinstance(problem, OSError) and problem.strerror:
        name = f"{problem.filename}: " if problem.filename is not None else ""
        return f"{name}{problem.strerror}"
    text = " ".join(str(problem).strip()[:4_000].partition("\n\n")[0].split())
    kind = type(problem).__name__
    return f"{text.rstrip('.')} ({kind})" if text else kind


def is_panic(problem: BaseException) -> bool:
    """Whether it is a panic of a library in Rust, which is not an `Exception`."""
    return type(problem).__name__ == "PanicException"


def is_memory(problem: BaseException) -> bool:
    """Whether `problem` says that memory has run out."""
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
    """Whether a line of this package raised it."""
    trace = problem.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(
        _OWN_FOLDERS
    )
