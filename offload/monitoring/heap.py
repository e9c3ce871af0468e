"""What the C library does with the memory of freed activations."""

import ctypes

import psutil

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MAPPED_BYTES = 64 << 20


class Heap:
    """Keeps freed activations for the next block, and gives them back to the system
    whenever `slack_bytes` more than after the last time are resident.

    glibc by itself does both badly. What has more than 32 MiB, such as one operation's
    result for 4,096 tokens, it takes from the system and gives back each time, and the
    kernel clears every page anew: a norm takes three times as long. Here that begins
    with 64 MiB, for as long as the process lives (larger ones leave holes: a GB of
    them with float32). What is smaller it keeps in ever more broken pieces: 400 MiB
    after twenty layers of a 1.1B model. Pages given back too eagerly are faulted in
    anew: the slack holds what one block frees and the next takes again. Does nothing on
    other C libraries.
    """

    def __init__(self, slack_bytes: int = 176 << 20) -> None:
        library = ctypes.CDLL(None)
        self._slack_bytes = slack_bytes
        self._trim = getattr(library, "malloc_trim", None)
        self._process = psutil.Process()
        self._least_bytes = self._resident_bytes()
        if self._trim is not None and library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES):
            # The one being set, the other no longer follows what is freed.
            library.mallopt(_M_TRIM_THRESHOLD, slack_bytes)

    def trim(self) -> None:
        """Gives back, if there is enough. To be called where little is needed."""
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
    """Freed memory of this process goes back to the system: nobody is going to use it
    for the next block. Does nothing on C libraries other than glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
