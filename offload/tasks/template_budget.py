"""A bound on what a chat template may do. It is a small program that comes with a
checkpoint: jinja's sandbox keeps it to text, but not from running for ever."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
_TEMPLATE = "<template>"
"""What jinja calls the file that it compiles a template to."""
MAX_LINES = 1_000_000
"""Of the program that a template is: a chat takes hundreds of them."""
MAX_GROWTH_BYTES = 1 << 30
"""Of this process's memory."""


class TemplateError(ValueError):
    """A template ran for too long, or made too much text."""


@contextmanager
def template_budget(
    *, max_lines: int = MAX_LINES, max_growth_bytes: int = MAX_GROWTH_BYTES
) -> Iterator[None]:
    """Raises TemplateError in a template that is rendered inside, by this thread, once
    it has run so many lines, or one of them has left the process so much larger."""
    memory = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    left, most_bytes = max_lines, _resident_bytes(memory) + max_growth_bytes

    def line(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise TemplateError(f"it runs more than {max_lines:,} lines")
        if _resident_bytes(memory) > most_bytes:
            raise TemplateError("it makes text without end")
        return line

    def call(frame: FrameType, event: str, arg: object) -> Any:
        return line if frame.f_code.co_filename == _TEMPLATE else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)
        os.close(memory)


def _resident_bytes(statm: int) -> int:
    """Of this process, as the open file `/proc/self/statm` has it."""
    return int(os.pread(statm, 64, 0).split()[1]) * _PAGE_BYTES
