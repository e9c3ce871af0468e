"""The interface of the package `libaio`, as far as io/readers/libaio_reader.py uses it,
over the kernel's own calls: that reader is tested on machines without libaio.so.1,
too."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType, TracebackType
from typing import Any, ClassVar, Literal, Self

from penstock.io.readers import libaio_reader as aio

AIOBLOCK_MODE_READ = object()
_PREADV = 7
_NUMBERS = {  # io_setup, io_destroy, io_getevents, io_submit
    "x86_64": (206, 207, 208, 209),
    "aarch64": (0, 1, 4, 2),
}

Choice = Literal["auto", "installed", "kernel", "missing"]
CHOICES: tuple[Choice, ...] = ("auto", "installed", "kernel", "missing")


class _Iovec(ctypes.Structure):
    _fields_: ClassVar = [("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]


class _Iocb(ctypes.Structure):
    """`struct iocb` of a little-endian machine."""

    _fields_: ClassVar = [
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("descriptor", ctypes.c_uint32),
        ("buffers", ctypes.c_uint64),
        ("num_buffers", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("eventfd", ctypes.c_uint32),
    ]


class _Event(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_uint64),
        ("iocb", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("result2", ctypes.c_int64),
    ]


_libc = ctypes.CDLL(None, use_errno=True)


def _call(index: int, *arguments: Any) -> int:
    number = _NUMBERS[platform.machine()][index]
    found = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


class AIOBlock:
    """One read: of which file, into which buffers, from which offset."""

    def __init__(self, mode: object) -> None:
        assert mode is AIOBLOCK_MODE_READ, "only reads are known here"
        self._iocb = _Iocb(opcode=_PREADV)
        self._buffers: tuple[memoryview, ...] = ()
        self._iovecs: Any = None
        self.target_file: int | None = None

    @property
    def offset(self) -> int:
        return int(self._iocb.offset)

    @offset.setter
    def offset(self, value: int) -> None:
        self._iocb.offset = value

    @property
    def buffer_list(self) -> tuple[memoryview, ...]:
        return self._buffers

    @buffer_list.setter
    def buffer_list(self, buffers: Iterable[memoryview]) -> None:
        self._buffers = tuple(buffers)
        places = [
            _Iovec(ctypes.addressof(ctypes.c_char.from_buffer(b)), len(b))
            for b in self._buffers
        ]
        self._iovecs = (_Iovec * len(places))(*places)
        self._iocb.buffers = ctypes.addressof(self._iovecs)
        self._iocb.num_buffers = len(places)

    def begin(self) -> tuple[int, Any]:
        """The address of what the kernel gets, and what has to live until it ends."""
        assert self.target_file is not None, "what is submitted has a file"
        self._iocb.descriptor = self.target_file
        return ctypes.addressof(self._iocb), (self._buffers, self._iovecs)


class AIOContext:
    """A queue of the kernel for `maxevents` reads."""

    def __init__(self, maxevents: int) -> None:
        self._maxevents = maxevents
        self._submitted: dict[int, tuple[AIOBlock, Any]] = {}
        self._context: ctypes.c_ulong | None = None
        context = ctypes.c_ulong(0)
        _call(0, ctypes.c_uint(maxevents), ctypes.byref(context))
        self._context = context

    def submit(self, blocks: Sequence[AIOBlock]) -> int:
        """The number of those that the kernel took."""
        begun = {}
        for block in blocks:
            address, kept = block.begin()
            assert address not in self._submitted, "a block is submitted once"
            begun[address] = (block, kept)
        addresses = (ctypes.c_void_p * len(begun))(*begun)
        # Before the call, after which an event may come at any time.
        self._submitted.update(begun)
        num = 0
        try:
            num = _call(3, self._context, ctypes.c_long(len(begun)), addresses)
        finally:
            for address in list(begun)[num:]:
                del self._submitted[address]
        return num

    def getEvents(self, min_nr: int) -> list[tuple[AIOBlock, int, int]]:
        """Waits for at least `min_nr` reads: of each its bytes, or minus its errno."""
        events = (_Event * self._maxevents)()
        num = _call(
            2,
            self._context,
            ctypes.c_long(min_nr),
            ctypes.c_long(self._maxevents),
            events,
            None,
        )
        return [
            (self._submitted.pop(event.iocb)[0], event.result, event.result2)
            for event in events[:num]
        ]

    def close(self) -> None:
        """Returns once the kernel writes into no buffer any more."""
        if self._context is not None:
            context, self._context = self._context, None
            _call(1, context)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def why_kernel_refuses() -> str | None:
    """Why this kernel has no queue for us; None where it has one."""
    if platform.machine() not in _NUMBERS or sys.byteorder != "little":
        return f"the numbers of {platform.machine()}'s system calls are not known here"
    try:
        AIOContext(1).close()
    except OSError as error:
        return f"the kernel refuses io_setup: {error}"
    return None


def why_skipped() -> str:
    """Why tests of the reader of libaio cannot run."""
    return why_kernel_refuses() or f"{aio.why_not()}, or --libaio=missing"


def packages() -> list[ModuleType]:
    """The modules that the reader can use as libaio: the installed one, and this
    one."""
    if aio.why_not() is not None:
        return []
    import libaio

    here = sys.modules[__name__]
    return [here] if libaio is here else [libaio, here]


def install(choice: Choice) -> str:
    """Lets `import libaio` find what `choice` says for the rest of this process, and
    returns what that is. With "auto", it is the installed one where that works."""
    reason = why_kernel_refuses()
    works = aio.why_not() is None
    if choice == "installed" and not works:
        raise RuntimeError(f"--libaio=installed, but {aio.why_not()}")
    if choice == "missing" or reason is not None:
        missing: Any = None
        sys.modules["libaio"] = missing
        return "missing" if reason is None else f"missing, {reason}"
    if choice == "kernel" or not works:
        sys.modules["libaio"] = sys.modules[__name__]
        return "the kernel's calls, by tests/kernel_aio.py"
    return "the installed one"
