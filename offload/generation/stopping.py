"""Tells transformers' loop on the host whether all rows have ended.

The loop asks its flags on the device at each step, and would wait for the answer.
"""

from collections.abc import Callable
from typing import Any, Self

import torch

from ...io.devices.known import Known

_KEPT = ("__invert__", "bitwise_not", "__and__", "__rand__", "bitwise_and")


class Ended(torch.Tensor):
    """Which rows have ended, bool [rows] on the device, and on the host whether the
    loop has to stop.

    transformers computes `unfinished = unfinished & ~ended`, and stops if
    `unfinished.max() == 0`: that is answered by `stops`.
    """

    stops: bool

    @classmethod
    def of(cls, ended: torch.Tensor, *, stops: bool) -> Self:
        found = ended.as_subclass(cls)
        found.stops = stops
        return found

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "max" and len(args) == 1 and not kwargs:
            (own,) = args
            most = torch.zeros_like(found, device="cpu").fill_(not own.stops)
            return Known.of(found.as_subclass(torch.Tensor), most)
        if name in _KEPT:
            newest = [value for value in args if isinstance(value, Ended)][-1]
            return cls.of(found, stops=newest.stops)
        return found
