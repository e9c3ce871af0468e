"""Makes the rates of the cost model from a machine's file and a policy."""

import math

from ...io.errors import PolicyError
from ...io.tier import Tier
from ...scheduler.cost.rates import CallCosts, Curve, Rates
from ..machines.machine import Machine
from ..policy import Policy

_HALF = ("bfloat16", "float16")


_DECODING = {
    "float8_e4m3fn": 0.5,
    "float8_e5m2": 0.5,
    "int8": 0.5,
    "int4": 0.25,
    "float4_e2m1": 0.25,
    "lossless": 0.8,
}
"""Stored bytes that are decoded while one is cast, where a machine's file has no
`decoding`: measured on a CPU with AVX2, by compiled code."""


def rates_of(
    machine: Machine, policy: Policy, dtype: str, *, decodes: bool = False
) -> Rates:
    """The rates of `machine` for weights of `dtype`. The `links` of `policy` limit some
    of its links. `decodes`: whether weights in memory are decoded when they are
    loaded, and so not used in place."""
    matmul = Curve.of(matmul_of(machine, dtype))
    attention = machine.attention.get(dtype)  # type: ignore[call-overload]
    device = machine.device_bandwidth or machine.host_bandwidth or math.inf
    is_cpu = machine.device == "cpu"
    reader = reader_of(machine, policy)
    disk = machine.disk
    cpu_seconds = 0.0 if disk is None else disk.cpu_seconds_per_gb.get(reader, 0.0)
    calls = machine.calls
    links = _links(machine, policy, reader)
    if decodes:
        links.setdefault(Tier.HOST, float(machine.host_bandwidth or math.inf))
    cast = machine.cast_bandwidth or math.inf
    estimated = {} if math.isinf(cast) else {c: cast * r for c, r in _DECODING.items()}
    return Rates(
        matmul_flops=matmul,
        attention_flops=Curve.of(attention) if attention else matmul,
        device_bytes=device,
        pointwise_bytes=machine.pointwise_bandwidth or device,
        decode_bytes=machine.decode_bandwidth or device,
        links=links,
        cast_bytes=cast,
        decoding={**estimated, **machine.decoding},
        num_cores=(machine.num_threads or machine.cores) if is_cpu else 0,
        read_cpu_seconds_per_byte=cpu_seconds / 1e9,
        out_bytes=machine.copies.pinned_to_host if machine.copies else math.inf,
        product_seconds=calls.product,
        crosses_host=not is_cpu,
        latency_seconds={t: link.latency for t, link in policy.links.items()},
        calls=CallCosts(
            job=calls.job,
            first_touch=calls.first_touch_per_gb / 1e9,
            cast=calls.cast_per_gb / 1e9,
            module=calls.module,
            batch=calls.batch,
            joint_module=calls.joint_module,
            decode_module=calls.decode_module,
            kv_layer=calls.kv_layer,
            step=calls.step,
            row_read=0.0 if disk is None else disk.row_read_seconds,
        ),
    )


def matmul_of(machine: Machine, dtype: str) -> dict[int, float]:
    """The FLOP/s of matrix products by their rows. Where a half precision is unknown,
    those of the other one. Raises PolicyError where neither is known."""
    found = machine.matmul.get(dtype)  # type: ignore[call-overload]
    if found is None and dtype in _HALF:
        found = next((machine.matmul[d] for d in _HALF if d in machine.matmul), None)
    if found is None:
        raise PolicyError(
            f"machine {machine.name!r} has no matmul rates for {dtype}, but for "
            f"{', '.join(machine.matmul)}: set dtype to one of these"
        )
    return dict(found)


def peak_flops(machine: Machine, dtype: str) -> float:
    """The most FLOP/s of matrix products in `dtype` on one device of `machine`."""
    return max(matmul_of(machine, dtype).values())


def reader_of(machine: Machine, policy: Policy) -> str:
    """The reader that the policy names, or the machine's best one."""
    asked = policy.io.reader
    if machine.disk is None or asked in machine.disk.bandwidth:
        return asked
    return machine.disk.best_reader


def _links(machine: Machine, policy: Policy, reader: str) -> dict[str, float]:
    """The bytes a second of the link from each tier whose weights are copied before
    use."""
    copies = machine.copies
    links: dict[str, float] = {}
    if machine.disk is not None:
        links[Tier.DISK] = float(machine.disk.bandwidth[reader])
    if copies is not None:
        links[Tier.HOST] = float(copies.pinned_to_device)
        links[Tier.PEER] = float(copies.peer or copies.pinned_to_device)
        # Other readers than gds pass through host memory.
        if Tier.DISK in links and reader != "gds":
            links[Tier.DISK] = min(links[Tier.DISK], links[Tier.HOST])
    for tier, held in policy.links.items():
        links[tier] = min(links.get(tier, math.inf), float(held.bandwidth))
    for name in policy.peer:
        if Tier.PEER in links:
            links[name] = links[Tier.PEER]
    return links
