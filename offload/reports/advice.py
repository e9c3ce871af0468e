"""Tests the advice of a report by the plan.

Advice that does not fit is left out, or given with the number that fits.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import yaml

from ..settings.values import exact_size
from .counts import Advice, Bound

_FASTER = 1.05
"""The least factor by which another dtype must be faster to be advised."""
_IN_FLIGHT = ("tokens_in_flight", "sequences_in_flight")


class Planned(Protocol):
    """What a plan says about some settings."""

    @property
    def rate(self) -> float:
        """Tokens per second."""
        ...

    @property
    def policy(self) -> Any: ...


Try = Callable[[Mapping[str, Any]], Planned | None]
"""Plans the job with some settings; returns None if they do not fit."""


def with_tried_advice(bound: Bound, trial: Try | None) -> Bound:
    """`bound` with the advice that fits; unchanged if nothing can be tried (None).
    Pure, except for `trial`."""
    if trial is None:
        return bound
    found = tuple(kept for one in bound.advice for kept in _tested(one, trial))
    return replace(bound, advice=found)


def _tested(advice: Advice, trial: Try) -> Iterator[Advice]:
    settings = yaml.safe_load(advice.setting) if advice.setting else {}
    if not settings:
        yield advice
    elif "dtype" in settings and len(settings) == 1:
        yield from _of_dtype(settings["dtype"], advice, trial)
    elif trial(settings) is not None:
        yield advice
    else:
        yield from _with_less(settings, advice, trial)


def _of_dtype(dtype: str, advice: Advice, trial: Try) -> Iterator[Advice]:
    """Advises `dtype` if the plan says that it is faster.

    If the user's working set is too small for it, one that is large enough is advised
    as well.
    """
    now = trial({})
    then, setting = trial({"dtype": dtype}), advice.setting
    if then is None:
        then = trial({"dtype": dtype, "device_memory": "auto"})
        if then is not None:
            size = exact_size(then.policy.device_memory)
            setting = f"{{dtype: {dtype}, device_memory: {size}}}"
    if then is None:
        return
    effect = f"{advice.effect} By the plan: {then.rate:,.1f} tokens/s."
    if now is not None:
        if then.rate < _FASTER * now.rate:
            return
        effect = f"{then.rate / now.rate:.1f}x as fast, by the plan: {advice.effect}"
    yield Advice(setting, effect)


def _with_less(
    settings: Mapping[str, Any], advice: Advice, trial: Try
) -> Iterator[Advice]:
    """Advises as many in flight as fit, if that is more than now."""
    key = next((key for key in _IN_FLIGHT if key in settings), None)
    now = trial({})
    if key is None or now is None:
        return
    least, most = int(getattr(now.policy, key)), int(settings[key])
    while (most := most // 2) > least:
        if trial({key: most}) is not None:
            effect = "as many as there is memory for; weights are hidden in part."
            yield Advice(f"{key}: {most}", effect)
            return
