"""Elements that are stored as they are used, or in another dtype."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .kernels import Kernels

_SERIAL_NUMEL = 32_000
"""Fewer elements than torch copies in parallel (at::internal::GRAIN_SIZE, 32,768)."""


@dataclass(frozen=True, slots=True)
class Cast:
    """Copies elements and casts them to the dtype of the target, as `Tensor.to` does;
    see `Codec`."""

    @property
    def name(self) -> str:
        return "cast"

    @property
    def identity(self) -> str:
        return "cast-1"

    @property
    def rows_each(self) -> tuple[int, ...]:
        return (1,)

    @property
    def is_elementwise(self) -> bool:
        return True

    @property
    def uses_kernels(self) -> bool:
        return False

    def decode(
        self, stored: Sequence[torch.Tensor], target: torch.Tensor, kernels: Kernels
    ) -> None:
        (source,) = stored
        copy_serially(target, source)


CAST = Cast()


def copy_serially(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies `source` to `target` (same shape, any dtypes), and casts.

    It uses the calling thread only. Torch would split a large copy over its own thread
    pool, which would compete with the thread that computes.
    """
    is_plain = target.is_contiguous() and source.is_contiguous()
    if not is_plain or source.device.type != "cpu":
        target.copy_(source)
        return
    # One call, so that the interpreter's lock is free for the computing thread.
    torch._foreach_copy_(
        list(torch.split(target.view(-1), _SERIAL_NUMEL)),
        list(torch.split(source.view(-1), _SERIAL_NUMEL)),
    )
