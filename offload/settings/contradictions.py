"""Finds keys of a policy that contradict each other, or have no effect. Pure."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...io.tier import Tier
from ..monitoring.show import human_bytes
from .counts import PARTS
from .origin import KeyPath, Problem

if TYPE_CHECKING:
    from ..policy import Policy


def contradictions(policy: "Policy") -> list[Problem]:
    """The keys that contradict each other. Each problem says what to write instead."""
    return [
        *_placement(policy),
        *_peers(policy),
        *_kv(policy),
        *_counts(policy),
        *_memory(policy),
        *_others(policy),
    ]


def without_effect(policy: "Policy") -> list[str]:
    """The keys that were set and have no effect, one sentence for each."""
    found = []
    if policy.device == "cpu":
        if policy.pinned_memory != "auto":
            found.append("pinned_memory has no effect: nothing is pinned for a CPU")
        if policy.activations == "host":
            found.append(
                "activations: host saves nothing: the device is the CPU, whose memory "
                "is the host's"
            )
        if policy.experts != "device":
            found.append(
                f"experts: {policy.experts} has no effect: the device is the CPU, "
                "which computes all experts"
            )
        if policy.staging_memory != "auto" and not (
            policy.peer or Tier.DISK in policy.links
        ):
            found.append(
                "staging_memory has no effect: on a CPU weights are read straight into "
                "their slots"
            )
    if policy.kv.attention == "host" and policy.kv.tier != "host":
        found.append(
            "kv.attention: host has no effect: keys and values are not kept in host "
            "memory (kv.tier)"
        )
    elsewhere = policy.experts != "device" and policy.device != "cpu"
    if elsewhere and policy.host_memory is None:
        found.append(
            f"experts: {policy.experts} has no effect: no weights stay in host memory "
            "(host_memory)"
        )
    if Tier.PEER in policy.links and not policy.peer:
        found.append("links.peer has no effect: there is no peer")
    keeps_nothing = policy.host_memory is None and not keeps_kv(policy)
    if Tier.HOST in policy.links and keeps_nothing:
        found.append("links.host has no effect: nothing is kept in host memory")
    return found


def keeps_kv(policy: "Policy") -> bool:
    """Whether Penstock keeps keys and values in tiers, instead of transformers."""
    return policy.kv.tier != "auto" or policy.kv.dtype != "auto"


def _placement(policy: "Policy") -> Iterator[Problem]:
    for rule, tier in policy.placement.items():
        if tier == Tier.HOST and policy.host_memory is None:
            fix = "set host_memory"
        elif tier == Tier.PEER and not policy.peer:
            fix = "set peer, such as {cuda:1: 40GiB}"
        elif tier not in set(Tier) and tier not in policy.peer:
            fix = f"set peer.{tier}"
        else:
            continue
        yield Problem(
            f"placement puts what matches {rule!r} into {tier!r}, which has room for "
            f"0: {fix}, or name another tier",
            (("placement", rule),),
        )


def _peers(policy: "Policy") -> Iterator[Problem]:
    for name in policy.peer:
        if policy.device != "cpu" and name == policy.device:
            yield Problem(
                f"peer.{name} is the device that computes: what stays there counts as "
                "device_memory; name another GPU, or take it out",
                (("peer", name), ("device",)),
                is_key=True,
            )


def _kv(policy: "Policy") -> Iterator[Problem]:
    kv = policy.kv
    if not keeps_kv(policy):
        for name in ("limits", "staging_memory"):
            if name in kv.model_fields_set and getattr(kv, name) not in ({}, "auto"):
                yield Problem(
                    f"kv.{name} has no effect while kv.tier is auto, since "
                    "transformers keeps the cache: set kv.tier to device, host or disk",
                    (("kv", name),),
                    is_key=True,
                )
        return
    if kv.attention == "host" and kv.dtype != "auto":
        yield Problem(
            "kv.attention: host reads keys and values where they are stored, and "
            f"cannot read kv.dtype: {kv.dtype}: leave one of the two out",
            (("kv", "attention"), ("kv", "dtype")),
        )
    asked = Tier.DEVICE if kv.tier == "auto" else kv.tier
    for tier in kv.limits:
        if Tier(tier).rank < Tier(asked).rank:
            yield Problem(
                f"kv.limits.{tier} is never reached: keys and values begin in kv.tier "
                f"{asked} and move on to slower ones only; take it out, or set kv.tier "
                f"to {tier}",
                (("kv", "limits", tier), ("kv", "tier")),
                is_key=True,
            )


def _counts(policy: "Policy") -> Iterator[Problem]:
    for part, (whole, _, _) in PARTS.items():
        least, most = getattr(policy, part), getattr(policy, whole)
        if least > most:
            yield Problem(
                f"{part} is {least} and {whole} is {most}, but a micro-batch is a part "
                f"of what is in flight: set {part} to at most {most}, or {whole} to at "
                f"least {least}",
                ((part,), (whole,)),
            )


def _memory(policy: "Policy") -> Iterator[Problem]:
    """`memory` limits all host memory of the process, so it must exceed what other keys
    take."""
    if policy.memory == "auto":
        return
    parts = dict(on_host(policy))
    together = sum(parts.values())
    if together >= policy.memory:
        named = {".".join(key): human_bytes(nbytes) for key, nbytes in parts.items()}
        names = " + ".join(f"{name} {size}" for name, size in named.items())
        total = f" make {human_bytes(together)}" if len(parts) > 1 else ""
        yield Problem(
            f"memory is {human_bytes(policy.memory)}, but {names}{total}, and Python "
            "and its libraries need some, too: raise memory, or leave sizes to auto",
            (("memory",), *parts),
        )


def on_host(policy: "Policy") -> Iterator[tuple[KeyPath, int]]:
    """The keys that take host memory, with their bytes, as far as they are given as
    numbers."""
    is_cpu = policy.device == "cpu"
    asked: dict[KeyPath, int | str | None] = {("host_memory",): policy.host_memory}
    asked["kv", "limits", "host"] = policy.kv.limits.get("host")
    if not is_cpu:
        asked["staging_memory",] = policy.staging_memory
    else:
        asked["device_memory",] = policy.device_memory
        asked["kv", "limits", "device"] = policy.kv.limits.get("device")
    if is_cpu or policy.activations == "host":
        asked["activation_memory",] = policy.activation_memory
    asked["peer", "cpu"] = policy.peer.get("cpu")
    for key, nbytes in asked.items():
        if isinstance(nbytes, int):
            yield key, nbytes


def _others(policy: "Policy") -> Iterator[Problem]:
    if policy.host_shared and policy.host_memory is None:
        yield Problem(
            "host_shared has no effect, since no weights stay in host memory: set "
            "host_memory, or leave host_shared out",
            (("host_shared",),),
        )
    if policy.ranks is not None:
        for key, is_set, why in (
            ("compile", policy.compile, "no compiled block can wait for another rank"),
            (
                "adapter",
                policy.ranks in ("gather", "tensor") and policy.adapter is not None,
                "only ranks that have blocks of their own divide an adapter",
            ),
            (
                "device",
                policy.ranks == "gather" and policy.device != "cpu",
                "ranks that gather weights compute on the CPU only, so far",
            ),
            (
                "device",
                policy.ranks == "tensor" and policy.device != "cpu",
                "ranks that divide products compute on the CPU only, so far",
            ),
            (
                "host_memory",
                policy.ranks == "gather" and bool(policy.host_memory),
                "what each rank keeps need not be sent",
            ),
            (
                "peer",
                policy.ranks == "gather" and bool(policy.peer),
                "what each rank keeps need not be sent",
            ),
        ):
            if is_set:
                yield Problem(
                    f"ranks: {policy.ranks} excludes {key}: {why}; leave one of the "
                    "two out",
                    (("ranks",), (key,)),
                )
    if policy.compile and policy.coalesce == "on":
        yield Problem(
            "compile: true and coalesce: on exclude each other: micro-batches would "
            "have to stop inside of compiled blocks; set coalesce: auto, or compile: "
            "false",
            (("compile",), ("coalesce",)),
        )
