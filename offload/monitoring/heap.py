"""Controls what the C library does with the memory of freed activations."""

import ctypes

import psutil

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MAPPED_BYTES = 64 << 20


class Heap:
    """Keeps freed activations for the next block, and returns memory to the system when
    `slack_bytes` more than after the last time are resident.

    glibc alone does both badly. It takes each allocation above 32 MiB from the system
    and returns it at once; then the kernel clears every page again, and a norm over
    4,096 tokens takes three times as long. Here this begins only at 64 MiB, for as long
    as the process lives. (With a higher limit, holes remain: 1 GB of them with
    float32.) Smaller allocations are kept in more and more pieces: 400 MiB after twenty
    layers of a 1.1B model. But pages that are returned too early cause page faults; so
    `slack_bytes` should hold what one block frees and the next one allocates.

    Does nothing with other C libraries.
    """

    def __init__(self, slack_bytes: int = 176 << 20) -> None:
        library = ctypes.CDLL(None)
        self._slack_bytes = slack_bytes
        self._trim = getattr(library, "malloc_trim", None)
        self._process = psutil.Process()
        self._least_bytes = self._resident_bytes()
        if self._trim is not None and library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES):
            # If one limit is set, glibc no longer adapts the other one.
            library.mallopt(_M_TRIM_THRESHOLD, slack_bytes)

    def trim(self) -> None:
        """Returns freed memory if there is enough of it. Call it when little memory is
        needed."""
        if self._trim is None:
            return
        now = self._resident_bytes()
        if now > self._least_bytes + self._slack_bytes:
            self._trim(0)
            self._least_bytes = self._resident_bytes()
        else:
            self._least_bytes = min(self._least_bytes, now)

    def _resident_bytes(self) -> int:
        return int(self._process.memory_info().rss)


def give_freed_back() -> None:
    """Returns all freed memory of this process to the system, because no next block
    will use it. Does nothing with C libraries other than glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
