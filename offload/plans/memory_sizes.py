"""Divides a machine's memory between weights and what is in flight."""

from dataclasses import dataclass
from typing import Any

from ...io.readers.files import ALIGNMENT
from ...scheduler.cost.memory_need import Need
from ...scheduler.cost.shape import ModelShape
from ..monitoring.show import human_bytes
from ..policy import Policy
from .planned import Budget

STEP_BYTES = 64 << 20


def is_free(asked: Policy, key: str) -> bool:
    """Whether the user, who set `asked`, leaves `key` to the planner."""
    value = getattr(asked, key)
    return key not in asked.model_fields_set or value == "auto"


@dataclass(frozen=True)
class MemorySizes:
    """Finds the sizes of memory that a policy leaves open."""

    asked: Policy
    """The policy as the user set it."""
    budget: Budget
    shape: ModelShape

    def for_need(self, policy: Policy, need: Need, parts: int) -> dict[str, Any] | None:
        """The sizes of memory for `policy` that leave room for `need`: multiples of one
        of the `parts` of each budget, since few sizes need few arrangements of the
        model; all that there is if `parts` is 0. None where that leaves too little."""
        shape = self.shape
        budget = self.budget.beside(need, policy.kv.tier)
        device, host = budget.device, budget.host
        if budget.is_shared:
            device -= self._set_on_host
        else:
            host -= self._set_on_host
        if min(device, host) < 0:
            return None
        values: dict[str, Any] = {}
        if is_free(self.asked, "device_memory"):
            whole = shape.resident_bytes + shape.streamed_bytes + (16 << 20)
            size = _rounded(min(whole, device), self.budget.device, parts)
            if device > whole:
                size = -(-whole // STEP_BYTES) * STEP_BYTES
            values["device_memory"] = size
        elif policy.device_memory != "auto" and policy.device_memory > device:
            return None
        if is_free(self.asked, "host_memory") and not budget.is_shared:
            host -= 3 * shape.largest_bytes  # staging
            size = _rounded(host, self.budget.host, parts)
            values["host_memory"] = max(0, min(shape.streamed_bytes, size)) or None
        if values.get("device_memory", 1) <= 0:
            return None
        host -= values.get("host_memory") or 0
        on_host = policy.kv.tier == "host" and not budget.is_shared
        size = values.get("device_memory", policy.device_memory)
        left = host if on_host or size == "auto" else device - size
        values.update(self._kv_limits(policy, need.kv + max(0, left >> 20 << 20)))
        return values

    @property
    def _set_on_host(self) -> int:
        """Bytes of weights in host memory, if the user has set its size."""
        if is_free(self.asked, "host_memory"):
            return 0
        whole = self.shape.resident_bytes + self.shape.streamed_bytes
        return min(self.asked.host_memory or 0, whole)

    def why_host_does_not(self, need: Need, least: int, name: str) -> str | None:
        """Why the host memory that the user set does not do on the machine `name`,
        beside `need` and the working set's `least` bytes; None if it does, or if the
        device would not do either."""
        budget = self.budget
        device, host = need.beside_weights("device", is_shared=budget.is_shared)
        left = budget.device - device - least
        if left >= 0 and not budget.is_shared:
            left = budget.host - host
        if not 0 <= left < self._set_on_host:
            return None
        return (
            f"host_memory is {human_bytes(self.asked.host_memory or 0)}, which does "
            f"not do: weights take {human_bytes(self._set_on_host)} of it, and "
            f"{name!r} has {human_bytes(left)} to give; set it to at most "
            f"{left >> 20} MiB, or leave it out"
        )

    def _kv_limits(self, policy: Policy, nbytes: int) -> dict[str, Any]:
        """Gives keys and values all memory that is left. By themselves they would stop
        at half of what is free when the model is loaded, and go on to a slower tier."""
        kv = policy.kv
        if kv.tier not in ("device", "host") or self.asked.kv.limits:
            return {}
        values = kv.model_dump(exclude_unset=True)
        return {"kv": {**values, "limits": {kv.tier: nbytes}}}


def _rounded(nbytes: int, whole: int, parts: int) -> int:
    """`nbytes`, down to a multiple of about one of the `parts` of `whole`, or of a page
    if there are none."""
    if not parts:
        return nbytes // ALIGNMENT * ALIGNMENT
    step = max(1, whole // parts // STEP_BYTES) * STEP_BYTES
    return nbytes // step * step
