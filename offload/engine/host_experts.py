"""Computes experts on the CPU, where they lie in host memory, beside a GPU.

The hidden states of the tokens that chose an expert move to host memory and back. Where
few tokens chose it, they have fewer bytes than its weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ...io.closing import Closing
from ...io.devices.device import Device
from ...io.event import Event
from ...io.fallbacks import Fallbacks
from ...io.memory.arena import Arena
from ...io.memory.host_buffers import HostBuffers
from ...io.tier import Tier
from ...io.weights.host import HostParameters
from ..policy import Policy
from ..units.division import Division
from ..units.sites import DividedStack, ModelDivision
from .readers import kernels_for
from .tiers import Tiers

Tensor = torch.Tensor


class HostExperts(Closing):
    """Moves hidden states between `device` and the CPU, through pinned buffers, and
    lends the weights of units to the CPU. Used by the thread that has the turn.

    `all_tokens` says which units the CPU may compute while they are in host memory, and
    how many tokens have to choose one so that it is loaded instead. Those that are
    `there` are in `least_tokens`. `wants_grad` says which weights have `requires_grad`
    in the model, by name.
    """

    def __init__(
        self,
        all_tokens: Mapping[int, int],
        there: Iterable[int],
        parameters: HostParameters | None,
        wants_grad: Mapping[str, bool],
        device: Device,
        pin: Callable[[Arena], Closing | None],
    ) -> None:
        self._all_tokens = all_tokens
        self.least_tokens = {unit: all_tokens[unit] for unit in there}
        self._parameters = parameters
        self._wants_grad = wants_grad
        self._device = device
        self._buffers = HostBuffers(pin)
        self._returned: Event | None = None
        """Passes when the last copy to the device is done."""

    def forget(self, unit: int) -> None:
        """A unit is in host memory no more."""
        self.least_tokens.pop(unit, None)

    def remember(self, unit: int) -> None:
        """A unit has come to host memory."""
        if unit in self._all_tokens:
            self.least_tokens[unit] = self._all_tokens[unit]

    def parameters(self, unit: int) -> dict[str, Tensor]:
        """The weights of `unit` in host memory, by name, until the next call. Their
        `requires_grad` is as on the device; see `Binding`."""
        assert self._parameters is not None, "there are units that it computes"
        found, records = self._parameters.of(unit), torch.is_grad_enabled()
        for name, tensor in found.items():
            tensor.requires_grad_(self._wants_grad[name] and not records)
        return found

    @contextmanager
    def sent(self, states: Tensor) -> Iterator[Callable[[], Tensor]]:
        """Starts to copy `states` (of the device) to host memory.

        Yields a function that waits for the copy and returns it, a tensor of the CPU
        that is there until the end of the context.
        """
        compute = self._device.compute
        with self._lent(states) as (here, used):
            compute.copy(here, states)
            used.append(compute.record())

            def arrived() -> Tensor:
                used[-1].wait()
                return here

            yield arrived

    def back(self, made: Sequence[Tensor]) -> Tensor:
        """Copies what the CPU has made, one behind the other, to the device."""
        compute = self._device.compute
        shape = (sum(len(each) for each in made), *made[0].shape[1:])
        there = torch.empty(shape, dtype=made[0].dtype, device=self._device.name)
        with self._lent(there) as (here, used):
            if self._returned is not None:  # from the same buffer, most likely
                self._returned.wait()
            torch.cat(list(made), out=here)
            compute.copy(there, here)
            self._returned = compute.record()
            used.append(self._returned)
        return there

    def close(self) -> None:
        """Frees the buffers. Call it after all work with them."""
        if self._parameters is None:
            return
        try:
            self._device.synchronize()
        finally:
            self._buffers.close()
            self._parameters.close()

    @contextmanager
    def _lent(self, like: Tensor) -> Iterator[tuple[Tensor, list[Event]]]:
        """A pinned tensor like `like`. The last event that is put into the list says
        when it is free again."""
        buffer = self._buffers.take(like.nbytes)
        used = [self._device.compute.record()]
        try:
            with torch.inference_mode(False):
                flat = buffer.tensor(0, like.nbytes).view(like.dtype)
                here = flat.view(like.shape)
            yield here, used
        finally:
            self._buffers.give_back(buffer, used[-1])


def open_host_experts(
    division: Division,
    tiers: Tiers,
    wants_grad: Mapping[str, bool],
    policy: Policy,
    fallbacks: Fallbacks,
) -> HostExperts:
    """What computes experts on the CPU. It is announced if the policy asks for that in
    vain."""
    tokens = least_tokens(division.found, policy)
    there = [unit for unit in tokens if tiers.placement[unit] == Tier.HOST]
    fallbacks.announce(why_none(division.found, there, policy))
    parameters = None
    if there:
        assert tiers.host is not None, "units are placed there"
        kernels = kernels_for(division.layouts, policy.io, fallbacks)
        kept = tiers.kept
        parameters = HostParameters(tiers.host, kept.layouts, kept.transfers, kernels)
    return HostExperts(tokens, there, parameters, wants_grad, tiers.device, tiers.pin)


def least_tokens(found: ModelDivision, policy: Policy) -> dict[int, int]:
    """How many tokens have to choose a unit of experts, so that it is loaded: of those
    units that the CPU may compute where they lie. Pure."""
    if isinstance(policy.experts, str) or policy.device == "cpu":
        return {}
    able = {
        unit
        for divided in _routed(found)
        if not any(True for _ in divided.stack.module.buffers())  # on the device
        for _, units in divided.windows
        for unit in units
    }
    return {
        index: policy.experts * (unit.experts[1] - unit.experts[0])
        for index, unit in enumerate(found.units)
        if unit.experts is not None and index in able
    }


def why_none(found: ModelDivision, there: Sequence[int], policy: Policy) -> str | None:
    """Why `experts` of the policy has no effect on a model that is divided so; None if
    it has, or if `without_effect` says it. The units that are `there` lie in host
    memory. Pure."""
    asked = policy.experts
    if asked == "device" or policy.device == "cpu" or policy.host_memory is None:
        return None
    if asked == "host":
        return (
            "experts: host is without a number of tokens here, so all experts are "
            "loaded: penstock plan and jobs choose it, by the rates that penstock "
            "machine measures; or set it, such as experts: 16"
        )
    if not any(_routed(found)):
        return (
            f"experts: {asked} has no effect: no experts of this model are loaded as "
            "they are chosen (it has none, all of it fits into device_memory, or they "
            "are of a kind that is not divided)"
        )
    if not there:
        return (
            f"experts: {asked} has no effect: no experts lie in host memory; raise "
            "host_memory, or name them in placement"
        )
    return None


def _routed(found: ModelDivision) -> Iterator[DividedStack]:
    """The stacks of which routers choose experts."""
    return (divided for divided in found.stacks if not divided.stack.is_dense)
