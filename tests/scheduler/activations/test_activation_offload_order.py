"""What suspended micro-batches hold moves out and back in the right order, on a device
that does its work late and records who waited for whom.

Each rule is also broken on purpose, and the recording device must notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch

from penstock.io.event import Event
from penstock.io.memory.arena import Arena
from penstock.io.memory.host_buffers import HostBuffers
from penstock.scheduler.activations.activation_offload import ActivationOffload
from penstock.scheduler.activations.ownership import Ownership, bytes_of
from recording import FakeEvent, FakeStream, RecordingDevice, range_of

pytestmark = pytest.mark.usefixtures("no_leaks")


def storage_of(nbytes: int) -> torch.UntypedStorage:
    return torch.empty(nbytes, dtype=torch.uint8).untyped_storage()


class MicroBatches:
    """Micro-batches with some storages each. Their bytes tell whose they are, and how
    often it has computed."""

    def __init__(self, device: RecordingDevice, sizes: list[list[int]]) -> None:
        self.device = device
        self.storages = [[storage_of(n) for n in some] for some in sizes]
        self.rounds = [0] * len(sizes)
        self.wrong: list[int] = []

    def compute(self, index: int) -> None:
        """A kernel that reads what the last one wrote there, and writes anew."""
        views = [bytes_of(storage) for storage in self.storages[index]]
        before = self.stamp(index)
        self.rounds[index] += 1
        after = self.stamp(index)
        is_first = self.rounds[index] == 1

        def act() -> None:
            for view in views:
                if not is_first and (view != before).any():
                    self.wrong.append(index)
                view.fill_(after)

        where = [range_of(view) for view in views]
        self.device.compute.give(act, where, where, f"kernel of {index}")

    def stamp(self, index: int) -> int:
        return (17 * index + self.rounds[index]) % 251

    @property
    def bytes_on_device(self) -> list[int]:
        return [sum(s.nbytes() for s in some) for some in self.storages]


@contextmanager
def offloading(
    seed: int,
    num: int,
    change: Callable[[ActivationOffload], None] = lambda offload: None,
) -> Iterator[tuple[MicroBatches, ActivationOffload]]:
    random = Random(seed)
    device = RecordingDevice(random)
    buffers = HostBuffers(lambda buffer: None)
    offload = ActivationOffload(
        device, buffers, Ownership(torch.device("cpu"), min_bytes=1)
    )
    sizes = [
        [random.randrange(1, 5000) for _ in range(random.randrange(1, 4))]
        for _ in range(num)
    ]
    change(offload)
    try:
        yield MicroBatches(device, sizes), offload
    finally:
        offload.close()


def sweep(micro_batches: MicroBatches, offload: ActivationOffload, rounds: int) -> None:
    """Each computes once a round, in an order that is now and then another one than was
    expected."""
    random = micro_batches.device.random
    order = list(range(len(micro_batches.storages)))
    for _ in range(rounds):
        for place, index in enumerate(order):
            following: int | None = order[(place + 1) % len(order)]
            if random.random() < 0.2:
                following = random.choice([None, *order])
            offload.begin_turn(index, following if following != index else None)
            micro_batches.compute(index)
            offload.move_out(index, micro_batches.storages[index])
            micro_batches.device.run(random.randrange(4))
        if random.random() < 0.3:
            random.shuffle(order)


def cases() -> list[Any]:
    return [(seed, num) for seed in range(15) for num in (1, 2, 3, 4, 7)]


@pytest.mark.parametrize(("seed", "num"), cases())
def test_every_access_waits_for_what_it_must(seed: int, num: int) -> None:
    with offloading(seed, num) as (micro_batches, offload):
        sweep(micro_batches, offload, 6)
        for index in range(num):
            offload.bring_back(index)
            micro_batches.compute(index)
        micro_batches.device.synchronize()
        assert micro_batches.wrong == []
        assert micro_batches.device.problems == []


@pytest.mark.parametrize(("seed", "num"), cases())
def test_the_host_never_waits_for_the_device_once_buffers_fit(
    seed: int, num: int
) -> None:
    with offloading(seed, num) as (micro_batches, offload):
        sweep(micro_batches, offload, 12)
        micro_batches.device.num_host_waits.clear()
        allocated = offload.statistics().num_activation_buffers
        sweep(micro_batches, offload, 6)
        if offload.statistics().num_activation_buffers == allocated:
            assert micro_batches.device.num_host_waits == {}


def test_in_a_steady_state_no_buffer_is_allocated() -> None:
    with offloading(0, 5) as (micro_batches, offload):
        sweep(micro_batches, offload, 20)
        allocated = offload.statistics().num_activation_buffers
        sweep(micro_batches, offload, 20)
        assert offload.statistics().num_activation_buffers == allocated
        assert (
            offload.statistics().activation_bytes_out
            > offload.statistics().activation_bytes_in
            > 0
        )


def test_the_device_holds_who_computes_and_its_neighbours() -> None:
    with offloading(0, 6) as (micro_batches, offload):
        for turn in range(24):
            index = turn % 6
            offload.begin_turn(index, (index + 1) % 6)
            if turn >= 6:
                held = [i for i, n in enumerate(micro_batches.bytes_on_device) if n]
                near = {(index - 1) % 6, index, (index + 1) % 6}
                assert set(held) == near
            micro_batches.compute(index)
            offload.move_out(index, micro_batches.storages[index])


# Each rule broken on purpose.


def deaf(stream: FakeStream, to: str) -> None:
    """`stream` does not wait for what was recorded on a stream called `to`."""
    listen = stream.wait

    def wait(event: Event) -> None:
        assert isinstance(event, FakeEvent)
        if event.stream != to:
            listen(event)

    stream.wait = wait  # type: ignore[method-assign]


def streams(offload: ActivationOffload) -> tuple[Any, Any, Any]:
    return offload._device.compute, offload._out, offload._back


def forget_who_computed(offload: ActivationOffload) -> None:
    """A copy out that does not wait for the work that wrote it."""
    compute, out, _ = streams(offload)
    deaf(out, compute.name)


def forget_the_copy_out(offload: ActivationOffload) -> None:
    """Memory that is given back while it is still copied from."""
    compute, out, _ = streams(offload)
    deaf(compute, out.name)


def forget_who_had_the_memory(offload: ActivationOffload) -> None:
    """A copy in that does not wait for the work of who had this memory before."""
    compute, _, back = streams(offload)
    deaf(back, compute.name)


def forget_the_copy_in(offload: ActivationOffload) -> None:
    """Work that does not wait for what it needs."""
    compute, _, back = streams(offload)
    deaf(compute, back.name)


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        (forget_who_computed, "does not wait for kernel"),
        (forget_the_copy_out, "giving memory back does not wait for copy"),
        (forget_who_had_the_memory, "copy on copies 2 does not wait for"),
        (forget_the_copy_in, "does not wait for copy on copies 2"),
    ],
)
def test_a_planted_bug_is_caught(
    change: Callable[[ActivationOffload], None], sign: str
) -> None:
    problems: list[str] = []
    for seed in range(5):
        with offloading(seed, 4, change) as (micro_batches, offload):
            sweep(micro_batches, offload, 6)
        problems += micro_batches.device.problems
    assert any(sign in problem for problem in problems)


# What a device cannot do.


def test_who_finds_no_memory_on_the_way_back_finds_everything_later() -> None:
    with offloading(1, 3) as (micro_batches, offload):
        sweep(micro_batches, offload, 1)
        for _ in range(2):  # all but the last are away
            offload.begin_turn(-1, None)
        resize, left = micro_batches.device.resize, 1

        def full(storage: torch.UntypedStorage, nbytes: int) -> None:
            nonlocal left
            left -= nbytes > 0
            if left < 0:
                raise torch.OutOfMemoryError("full")
            resize(storage, nbytes)

        micro_batches.storages[0].append(storage_of(0))
        away = [i for i, n in enumerate(micro_batches.bytes_on_device) if not n]
        micro_batches.device.resize = full  # type: ignore[method-assign]
        for index in away:
            left = 0
            offload.begin_turn(-1, index)  # it only tried
            with pytest.raises(torch.OutOfMemoryError):
                offload.bring_back(index)
        assert away
        assert all(micro_batches.bytes_on_device[index] == 0 for index in away)
        micro_batches.device.resize = resize  # type: ignore[method-assign]
        for index in away:
            offload.bring_back(index)
            micro_batches.compute(index)
        micro_batches.device.synchronize()
        assert micro_batches.wrong == []
        assert micro_batches.device.problems == []


def test_buffers_grow_with_what_is_moved_and_are_not_more_than_are_lent() -> None:
    closed: list[int] = []

    class Pin:
        def close(self) -> None:
            closed.append(1)

    pins: Any = lambda buffer: Pin()  # noqa: E731
    device = RecordingDevice(Random(0))
    with HostBuffers(pins) as buffers:
        for nbytes in range(10_000, 1_000_000, 10_000):
            taken: list[Arena] = [buffers.take(nbytes) for _ in range(2)]
            assert all(buffer.nbytes >= nbytes for buffer in taken)
            assert buffers.nbytes <= 2 * 1.25 * nbytes + 4 * (64 << 10)
            for buffer in taken:
                buffers.give_back(buffer, device.compute.record())
        assert buffers.num_allocated <= 2 * 16
        assert len(closed) == buffers.num_allocated - 2
    assert len(closed) == buffers.num_allocated
