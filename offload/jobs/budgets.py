"""Divides a policy among processes that share a machine. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ...io.tier import KV_TIERS
from ..settings.contradictions import keeps_kv
from ..settings.memory_budget import reserve_of

if TYPE_CHECKING:
    from ..policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What there is to divide, in bytes."""

    num_gpus: int
    free_bytes: Mapping[str, int]
    """By tier: `device` (of the GPU that has least; of the host, for a CPU), `host` and
    `disk`."""
    model_bytes: int
    """At most, in the dtype that it computes in."""
    taken_bytes: int = 0
    """Host memory that the process takes which hands the rows out."""


class Budgets(NamedTuple):
    """What each process is asked for."""

    policies: Sequence["Policy"]
    notes: Sequence[str]
    """What is not as the policy says, in a sentence each."""


def divided(policy: "Policy", num: int, room: Room) -> Budgets:
    """`policy` for each of `num` processes. Sizes that are `auto` are divided; those
    that were said hold for each. With `device: cuda` process i has GPU i, in turn."""
    settings: list[str] = []
    notes: list[str] = []
    sharing = num
    devices = [policy.device] * num
    if policy.device == "cuda" and room.num_gpus > 1:
        devices = [f"cuda:{index % room.num_gpus}" for index in range(num)]
        sharing = -(-num // room.num_gpus)
    is_shared = policy.host_shared or "host_shared" not in policy.model_fields_set
    shared = policy.host_memory if policy.host_memory and is_shared else 0
    memory = _memory_of_each(policy, num, room, shared)
    settings.append(f"memory={memory}")
    notes.append(f"memory: {memory:,} bytes are for each of {num} workers")
    if policy.device_memory == "auto" and policy.device != "cpu":
        share = min(room.free_bytes["device"] // 2 // sharing, room.model_bytes)
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
    """Bytes of the host's memory that each process may take: the `shared` ones, which
    all of them have in common, are in each one's."""
    free = room.free_bytes["host"]
    left = free - reserve_of(free)
    if policy.memory != "auto":
        left = policy.memory - room.taken_bytes
    return max((left - shared) // num + shared, 1)


def threads_of(num_threads: int, num: int) -> int:
    """The share of each of `num` processes in what one would have."""
    return max(1, num_threads // num)


def _of_kv(policy: "Policy", num: int, sharing: int, room: Room) -> list[str]:
    """Budgets of keys and values that nobody said, as they are for one process. In the
    host's memory they are a part of each one's `memory`."""
    if not keeps_kv(policy):
        return []
    first = "device" if policy.kv.tier == "auto" else policy.kv.tier
    found = []
    in_memory = ("device", "host") if policy.device == "cpu" else ("host",)
    for tier in KV_TIERS[KV_TIERS.index(first) :]:
        if tier not in policy.kv.limits and tier not in in_memory:
            each = sharing if tier == "device" else num
            part = 1 if tier == "disk" else 2
            nbytes = room.free_bytes[tier] // part // each
            found.append(f"kv.limits.{tier}={nbytes}")
    return found
