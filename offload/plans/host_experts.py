"""Chooses which experts the CPU computes beside a GPU: the number for `experts: host`.
Pure."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ...io.tier import Tier
from ...scheduler.cost.host_experts import ExpertUnit, HostRates, least_tokens
from ...scheduler.cost.rates import Curve
from ..machines.machine import Machine
from .forecast import Forecast


@dataclass(frozen=True, slots=True)
class ExpertsChoice:
    """Where experts are computed, and why."""

    experts: Literal["device", "host"] | int
    """The value of the policy's key."""
    sentence: str = ""
    """What is to be said of it; "" if nothing."""


def choose_experts(forecast: Forecast, machine: Machine, dtype: str) -> ExpertsChoice:
    """Where the experts of a model that computes in `dtype` are computed, as its
    forecast says that it is arranged."""
    asked = forecast.policy.experts
    if asked == "device":
        return ExpertsChoice(asked)
    if not machine.is_accelerated:
        says = f"experts: {asked} has no effect: the CPU computes all experts"
        return ExpertsChoice("device", says)
    units = set(_units(forecast))
    if not units:
        says = (
            f"experts: {asked} has no effect: no experts are loaded from host memory, "
            "as they are chosen"
        )
        return ExpertsChoice("device", says)
    if asked != "host":
        return ExpertsChoice(asked, _says(asked, "as you set it"))
    products = machine.host_matmul.get(dtype)  # type: ignore[call-overload]
    rates = forecast.model.rates
    if not products or Tier.HOST not in rates.links:
        says = (
            f"all experts are computed on the device: machine {machine.name!r} has no "
            f"host_matmul rates for {dtype}, which penstock machine --device "
            f"{machine.device} measures; or set experts to a number"
        )
        return ExpertsChoice("device", says)
    host = HostRates(Curve.of(products), float(machine.host_bandwidth or math.inf))
    least, unit = min(
        ((least_tokens(unit, rates, host), unit) for unit in units),
        key=lambda found: found[0],
    )
    loading = unit.load_seconds(rates) * 1e3
    computing = unit.host_seconds(1, rates, host) * 1e3
    times = f"{loading:.2f} ms to load, {computing:.2f} ms there for one token"
    if least == 1:
        says = f"all experts are computed on the device: an expert takes {times}"
        return ExpertsChoice("device", says)
    return ExpertsChoice(least, _says(least, times))


def _says(num: int, why: str) -> str:
    return (
        f"experts with fewer than {num:,} tokens are computed on the CPU, where they "
        f"lie in host memory ({why}); the prediction loads all of them"
    )


def _units(forecast: Forecast) -> Iterator[ExpertUnit]:
    """The units of experts that are loaded from host memory, without their names: most
    of them are alike."""
    shape, settings = forecast.shape, forecast.model.settings
    found = forecast.arrangement.division.found
    for divided in found.stacks:
        for index in (unit for _, units in divided.windows for unit in units):
            experts = found.units[index].experts
            is_there = settings.placement[index] == Tier.HOST
            if divided.stack.is_dense or experts is None or not is_there:
                continue
            yield ExpertUnit(
                replace(shape.units[index], name="", sites=()),
                experts[1] - experts[0],
                shape.hidden * shape.itemsize,
                shape.itemsize,
                settings.kept_of(index),
            )
