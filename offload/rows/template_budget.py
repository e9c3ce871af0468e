"""Limits what a chat template may do.

A template is a small program that comes with a checkpoint. jinja's sandbox restricts it
to text, but does not stop it from running forever.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jinja2.filters
import jinja2.sandbox

from .template_steps import Stopped, TemplateError, check_step

_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
_TEMPLATE = "<template>"
"""The file name that jinja gives to compiled templates."""
_STEPS = (jinja2.filters.__file__, jinja2.sandbox.__file__)
"""The files of functions that templates call."""
MAX_LINES = 1_000_000
"""How many lines a template may run; a chat needs hundreds."""
MAX_GROWTH_BYTES = 1 << 30
"""How many bytes the memory of this process may grow."""
MAX_SECONDS = 2.0
"""How many seconds of processor time this thread may take; a chat needs thousandths of
one."""


@contextmanager
def template_budget(
    *,
    max_lines: int = MAX_LINES,
    max_growth_bytes: int = MAX_GROWTH_BYTES,
    max_seconds: float = MAX_SECONDS,
) -> Iterator[None]:
    """Limits templates that this thread compiles or renders in the `with` block.

    Raises TemplateError if a template runs too many lines or for too long, makes the
    process grow too much, or is about to make too much text in one step.
    """
    memory = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    left, most_bytes = max_lines, _resident_bytes(memory) + max_growth_bytes
    end = time.thread_time() + max_seconds

    def check() -> None:
        if _resident_bytes(memory) > most_bytes:
            raise Stopped("it makes too much text")
        if time.thread_time() > end:
            raise Stopped(f"it runs for more than {max_seconds:g} s")

    def line(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped(f"it runs more than {max_lines:,} lines")
        check()
        return line

    def call(frame: FrameType, event: str, arg: object) -> Any:
        check()
        name = frame.f_code.co_filename
        if name in _STEPS:
            check_step(frame.f_code.co_name, frame.f_locals, max_growth_bytes)
        return line if name == _TEMPLATE else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    except Stopped as stopped:
        raise TemplateError(str(stopped)) from None
    finally:
        sys.settrace(before)
        os.close(memory)


def _resident_bytes(statm: int) -> int:
    """Resident bytes of this process, by the open file `/proc/self/statm`."""
    return int(os.pread(statm, 64, 0).split()[1]) * _PAGE_BYTES
