"""Host memory for weights, keys and values.

`Memory` (arena) is the contract of memory on any device. `HostMemory` is its host form:
an `Arena` is private to the process, a `SharedArena` (shared) is one copy for several
processes. `Pinned` (pinned) locks pages of host memory, so that a GPU copies from them
at full speed. `numa` places pages near a GPU. `HostBuffers` (host_buffers) lends
arenas and uses them again.
"""
