"""Divides a policy among processes that share a machine. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ...io.tier import KV_TIERS, Tier
from ..settings.contradictions import keeps_kv
from ..settings.memory_budget import reserve_of

if TYPE_CHECKING:
    from ..policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The memory that is divided, in bytes."""

    num_gpus: int
    free_bytes: Mapping[str, int]
    """Free bytes by tier: `device` (of the GPU with the least, or of the host where the
    device is a CPU), `host` and `disk`."""
    model_bytes: int
    """The most bytes of the weights, in the dtype that is computed in."""
    taken_bytes: int = 0
    """Host memory of the process that hands out the rows."""
    ring_bytes: int = 0
    """Host memory that the processes share what they read through."""


class Budgets(NamedTuple):
    """A policy for each process."""

    policies: Sequence["Policy"]
    notes: Sequence[str]
    """What differs from the user's policy, in a sentence each."""


def divided(policy: "Policy", num: int, room: Room) -> Budgets:
    """`policy` divided among `num` processes. Sizes that are `auto` are divided; sizes
    that the user set hold for each process. With `device: cuda` process i uses GPU i,
    modulo the number of GPUs."""
    settings: list[str] = []
    notes: list[str] = []
    sharing = num
    devices = [policy.device] * num
    if policy.device != "cpu" and ":" not in policy.device and room.num_gpus > 1:
        devices = [f"{policy.device}:{i % room.num_gpus}" for i in range(num)]
        sharing = -(-num // room.num_gpus)
    is_shared = policy.host_shared or "host_shared" not in policy.model_fields_set
    shared = policy.host_memory if policy.host_memory and is_shared else 0
    memory = _memory_of_each(policy, num, room, shared)
    settings.append(f"memory={memory}")
    notes.append(f"memory: {memory:,} bytes are for each of {num} workers")
    if policy.device_memory == "auto" and policy.device != "cpu":
        share = min(room.free_bytes[Tier.DEVICE] // 2 // sharing, room.model_bytes)
        settings.append(f"device_memory={share}")
        notes.append(
            f"device_memory: auto is {share:,} bytes for each of {num} workers"
        )
    elif policy.device_memory != "auto":
        notes.append(
            f"device_memory: {policy.device_memory:,} bytes are for each of {num} "
            f"workers: {num * policy.device_memory:,} bytes together"
        )
    if shared and not policy.host_shared:
        settings.append("host_shared=true")
        notes.append("host_shared: true, so that the workers share host_memory")
    settings += _of_kv(policy, num, sharing, room)
    return Budgets(
        [policy.with_settings([*settings, f"device={name}"]) for name in devices],
        notes,
    )


def _memory_of_each(policy: "Policy", num: int, room: Room, shared: int) -> int:
    """Bytes of host memory that each process may take, with the `shared` ones that all
    processes have in common."""
    left = bytes_to_divide(policy, room) - room.ring_bytes
    return max((left - shared) // num + shared, 1)


def bytes_to_divide(policy: "Policy", room: Room) -> int:
    """Bytes of host memory for all processes together."""
    free = room.free_bytes[Tier.HOST]
    if policy.memory == "auto":
        return free - reserve_of(free)
    return policy.memory - room.taken_bytes


def threads_of(num_threads: int, num: int) -> int:
    """The threads of each of `num` processes, where one process would have
    `num_threads`."""
    return max(1, num_threads // num)


def _of_kv(policy: "Policy", num: int, sharing: int, room: Room) -> list[str]:
    """Settings that divide the memory for keys and values, where the user set none:
    each process gets its share of what one process would have. In host memory they are
    a part of its `memory`."""
    if not keeps_kv(policy):
        return []
    first = Tier.DEVICE if policy.kv.tier == "auto" else policy.kv.tier
    found = []
    in_memory = (Tier.DEVICE, Tier.HOST) if policy.device == "cpu" else (Tier.HOST,)
    for tier in KV_TIERS[KV_TIERS.index(first) :]:
        if tier not in policy.kv.limits and tier not in in_memory:
            each = sharing if tier == Tier.DEVICE else num
            part = 1 if tier == Tier.DISK else 2
            nbytes = room.free_bytes[tier] // part // each
            found.append(f"kv.limits.{tier}={nbytes}")
    return found
