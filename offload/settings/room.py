"""Finds out how much host memory a process may take: what its policy says, or what is
free."""

from pathlib import Path

from ..monitoring.memory import available_bytes, usage
from ..policy import Policy
from .memory_budget import MemoryRoom, reserve_of

COMING_BYTES = 32 << 20
"""Bytes that libraries allocate once they compute: threads and buffers of kernels.
Measured: 26 MiB."""
_TOKENIZER_TIMES = 20
"""Bytes of memory for each byte of tokenizer.json. Measured with 32,000 tokens: 18."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")


def room_for(policy: Policy, coming_bytes: int = COMING_BYTES) -> MemoryRoom:
    """The room for a model that is about to be put together.

    The process will allocate `coming_bytes` more by itself.
    """
    used = usage()
    runtime = used.resident_bytes + coming_bytes
    if policy.memory != "auto":
        return MemoryRoom(total=policy.memory, runtime=runtime, is_asked=True)
    # Pages of library files count as free, but without them the process would be very
    # slow.
    free = available_bytes() + used.resident_bytes - used.file_bytes
    return MemoryRoom(total=free - reserve_of(free), runtime=runtime)


def coming_with(checkpoint: Path) -> int:
    """Bytes that a process will allocate beside the model in the folder `checkpoint`,
    its tokenizer included."""
    for name in _TOKENIZERS:
        try:
            nbytes = (checkpoint / name).stat().st_size
        except OSError:
            continue
        return COMING_BYTES + _TOKENIZER_TIMES * nbytes
    return COMING_BYTES
