"""What a process may take of this machine's memory: what its policy says, or what is
free."""

from pathlib import Path

from ..monitoring.memory import available_bytes, usage
from ..policy import Policy
from .memory_budget import MemoryRoom, reserve_of

COMING_BYTES = 32 << 20
"""What libraries allocate once they compute: threads, kernels' own buffers (measured:
26 MiB)."""
_TOKENIZER_TIMES = 20
"""Bytes in memory of a byte of tokenizer.json (measured: 18, of 32,000 tokens)."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")


def room_for(policy: Policy, coming_bytes: int = COMING_BYTES) -> MemoryRoom:
    """For a model that is about to be put together, in a process that will allocate
    `coming_bytes` more by itself."""
    used = usage()
    runtime = used.resident_bytes + coming_bytes
    if policy.memory != "auto":
        return MemoryRoom(total=policy.memory, runtime=runtime, is_asked=True)
    # Pages of library files are free memory, but a process without them crawls.
    free = available_bytes() + used.resident_bytes - used.file_bytes
    return MemoryRoom(total=free - reserve_of(free), runtime=runtime)


def coming_with(checkpoint: Path) -> int:
    """Bytes that a process will allocate beside the model in the folder `checkpoint`:
    those of its tokenizer, too."""
    for name in _TOKENIZERS:
        try:
            nbytes = (checkpoint / name).stat().st_size
        except OSError:
            continue
        return COMING_BYTES + _TOKENIZER_TIMES * nbytes
    return COMING_BYTES
