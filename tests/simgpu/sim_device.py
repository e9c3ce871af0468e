"""The simulated GPU, for tests: `start()` makes it torch's accelerator in this process.

It stays that until the process ends, so only processes of their own call it: mark a
test `@pytest.mark.simgpu` (see sim_child.py) and take the fixture `simgpu`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

import sim_build
import sim_plugin

SYNCS = (
    "stream",
    "device",
    "event",
    "covered",
    "item",
    "copy",
    "shape",
    "allocator",
)
"""Why the host waited: for a stream, a device or an event, as asked; for a number
(`.item()`), a copy from or to memory that is not pinned, a shape that depends on values
(`nonzero`), or since cached memory was given back.

A wait is `covered` if it is for an event behind which the stream has at least 16 more
pieces of work: then the device does not idle while the host wakes up. An event that has
passed makes nobody wait, and is not counted."""
CAPACITY_BYTES = 1 << 30
"""Memory of each device, until a test says otherwise."""


class SimGpu:
    """What a test can ask of the device, beyond what torch has calls for."""

    def __init__(self) -> None:
        self._ops: Any = torch.ops.simgpu

    def schedule(
        self,
        seed: int,
        *,
        most_held_ops: int = 256,
        held_seconds: float = 0.05,
        late_seconds: float = 0.002,
    ) -> None:
        """Delays queued work by draws from `seed`, differently for each stream.

        A piece of work begins when the host has made up to `most_held_ops` further
        calls, or `held_seconds` after it was queued, or when somebody waits for it:
        then, if it is held at all, `late_seconds` after it was queued. With 0 calls it
        begins as soon as it can. Seeds differ in kind, modulo 4: 0 draws each piece's
        delay; 1 makes the default streams late and the others prompt; 2 the other way
        round; 3 makes each stream late for a while, then prompt. So use four at least.
        """
        self._ops.schedule(seed, most_held_ops, held_seconds, late_seconds)

    @contextlib.contextmanager
    def held(self, stream: torch.Stream) -> Iterator[None]:
        """The stream begins no work in this block, unless somebody waits for it."""
        where = (stream.device_index, stream.stream_id)
        self._ops.hold(*where, True)
        try:
            yield
        finally:
            self._ops.hold(*where, False)

    def syncs(self, *, this_thread: bool = False) -> Counter[str]:
        """How often the host has waited so far, by reason (see `SYNCS`)."""
        counts = (self._ops.num_syncs(i, this_thread) for i in range(len(SYNCS)))
        return +Counter(dict(zip(SYNCS, counts, strict=True)))

    @contextlib.contextmanager
    def no_syncs(self) -> Iterator[None]:
        """Whatever would make this thread wait raises RuntimeError in this block, but
        for waits that are covered (see `SYNCS`)."""
        self._ops.forbid_syncs(True)
        try:
            yield
        finally:
            self._ops.forbid_syncs(False)

    def num_pieces(self) -> int:
        """Kernels, copies, fills, waits and records of events queued so far."""
        return int(self._ops.num_pieces())

    def set_capacity(self, num_bytes: int, device: int = 0) -> None:
        self._ops.set_capacity(device, num_bytes)

    def take_error(self) -> str:
        """What the first kernel said that failed; "" if none did. Until it is taken,
        everybody who waits gets it raised."""
        return str(self._ops.take_error())


@functools.cache
def start() -> SimGpu:
    """Makes the simulated GPU this process's accelerator, and that of processes that it
    spawns.

    Raises NoCompilerError where it cannot be compiled.
    """
    path = sim_build.compiled()
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    torch._C._rename_privateuse1_backend("simgpu")
    torch.ops.simgpu.register_device()
    import sim_module

    torch._register_device_module("simgpu", sim_module.as_module())  # type: ignore[no-untyped-call]
    sys.path += [path for path in sim_plugin.paths() if path not in sys.path]
    atexit.register(_settle)
    return SimGpu()


def _settle() -> None:
    """Queued work ends before torch's own memory goes."""
    if not torch.ops.simgpu.is_forked():
        torch.ops.simgpu.take_error()
        for index in range(torch.accelerator.device_count()):
            torch.accelerator.synchronize(index)


def on_device(
    inputs: dict[str, torch.Tensor], device: torch.device | str
) -> dict[str, torch.Tensor]:
    """Keyword inputs of a model, on the device."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def first_output(outputs: Any) -> torch.Tensor:
    """What a model of transformers gives in the first place, such as the logits."""
    named = (outputs.get(name) for name in ("logits", "logits_per_image"))
    found = next((value for value in named if value is not None), outputs[0])
    assert isinstance(found, torch.Tensor)
    return found
