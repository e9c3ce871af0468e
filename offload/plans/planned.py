"""What a planner is asked for, the memory that it may use, and what it chooses."""

from dataclasses import dataclass, field

from ...io.tier import Tier
from ...scheduler.cost.memory_need import RUNTIME_BYTES, Need
from ...scheduler.cost.workload import Prediction
from ..machines.machine import Machine
from ..monitoring.show import human_bytes
from ..policy import Policy
from ..tasks.score_task import Score
from ..tasks.task import Task
from .forecast import Forecast

USABLE = 0.9
"""The share of a memory that is planned with. The rest is for the system and for what
is not counted."""
_SAFE = 0.7
"""The share of the computing time that an estimated link may be busy."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A task and the length of its rows."""

    task: Task = field(default_factory=Score)
    row_tokens: int = 128
    """The tokens of each row. For a task that generates, those of its prompt."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The bytes that a plan may use."""

    device: int
    host: int
    is_shared: bool
    """Whether device and host have one memory. Then `device` is all of it."""
    disk: int | None = None
    """Bytes that keys and values may take on the drive; None: not known."""

    def beside(self, need: Need, kv_tier: str) -> "Budget":
        """What is left for weights beside `need`, with keys and values in `kv_tier`.
        Negative where it does not fit."""
        device, host = need.beside_weights(kv_tier, is_shared=self.is_shared)
        left = self.device - device
        return Budget(
            left,
            left if self.is_shared else self.host - host,
            self.is_shared,
            self.disk,
        )

    def has_place_for(self, need: Need, kv_tier: str) -> bool:
        """Whether the drive has room for keys and values that go to it."""
        return kv_tier != Tier.DISK or self.disk is None or need.kv <= self.disk


def budget_of(machine: Machine, policy: Policy) -> Budget:
    """The memory of `machine`, or the policy's `memory`, less what the runtime takes.
    Pure."""
    asked, device = policy.memory, machine.device_memory
    host = int(machine.host_memory * USABLE)
    host = (host if asked == "auto" else min(asked, host)) - RUNTIME_BYTES
    on_device = host if device is None else int(device * USABLE)
    disk = machine.disk
    free = None if disk is None or disk.free is None else int(disk.free * USABLE)
    return Budget(on_device, host, is_shared=device is None, disk=free)


@dataclass(frozen=True, slots=True)
class Choice:
    """One policy, with its forecast, its prediction and the memory that it needs."""

    policy: Policy
    forecast: Forecast
    prediction: Prediction
    need: Need
    asked: Policy | None = None
    """The policy before its sizes of memory were chosen; None if it had them."""

    @property
    def rate(self) -> float:
        """Tokens a second: generated ones, or those that run through the model."""
        found = self.prediction
        return found.output_tokens_per_second or found.tokens_per_second

    @property
    def is_safe(self) -> bool:
        """Whether computing still hides the links if they are slower than estimated."""
        found = self.prediction
        busiest = max(found.busy_seconds.values(), default=0.0)
        return busiest <= _SAFE * found.compute_seconds

    @property
    def in_flight(self) -> int:
        return self.policy.tokens_in_flight * self.policy.sequences_in_flight


def no_place(name: str, num: int, need: Need, budget: Budget) -> str:
    """Why keys and values of `num` sequences fit nowhere on the machine `name`."""
    assert budget.disk is not None, "else it would do"
    where = f"neither the device ({human_bytes(budget.device)} to give)"
    if not budget.is_shared:
        where += f", host memory ({human_bytes(budget.host)})"
    return (
        f"{name!r} cannot run it: keys and values of {num:,} sequences take "
        f"{human_bytes(need.kv)}, for which {where} nor the drive "
        f"({human_bytes(budget.disk)}) has room; fewer sequences_in_flight, shorter "
        "rows, or more room on the drive would do"
    )


def why_not(
    name: str,
    asked: object,
    least: int,
    beside: int,
    device: int,
    *,
    whole_bytes: int,
) -> str:
    """Why nothing fits on the machine `name`, and what would. All numbers are bytes:
    `asked` is the policy's device_memory, if it is set; the largest part and what is
    always needed take `least`, what is in flight takes `beside`; the device has
    `device` to give, and one with `whole_bytes` would do."""
    parts = (
        f"its largest part and what is always needed take {human_bytes(least)}, what "
        f"is in flight {human_bytes(beside)}"
    )
    if isinstance(asked, int) and least + beside <= device:
        over = asked + beside > device
        most = f"at most {human_bytes(device - beside)} (of {name!r})"
        return (
            f"device_memory is {human_bytes(asked)}, which does not do: {parts}; set "
            f"it to {most if over else f'at least {_mib_up(least)} MiB'}, or to auto"
        )
    return (
        f"{name!r} cannot run it: {parts}, and the device has {human_bytes(device)} to "
        f"give; a device with {human_bytes(whole_bytes)} of memory, shorter rows, or a "
        "dtype of fewer bytes would do"
    )


def _mib_up(nbytes: int) -> int:
    return -(-nbytes // (1 << 20))
