"""A streamed weight while it is loaded, and how writes to it are noticed."""

from typing import Any

import torch
from torch import nn

from ...io.errors import PenstockError


class BoundParameter(nn.Parameter):
    """A parameter whose bytes are in a slot. Reading it is like reading any parameter.

    Each write through torch raises the version counter. That includes writes through
    `data`: here it shares the counter, while the `data` of a plain parameter has one of
    its own.
    """

    streamed_name: str
    _known_version: int
    _in_slot: torch.Tensor | None
    """The bytes in the slot, while a cast of them takes their place; else None."""

    @staticmethod
    def of(name: str, tensor: torch.Tensor, requires_grad: bool) -> "BoundParameter":
        """The parameter `name`, a view of `tensor` with its shape and dtype.

        Call it outside of inference mode. What a device copies into the slot raises the
        counter of the slot; `tensor.data` has another counter.
        """
        self = BoundParameter(tensor.data, requires_grad=requires_grad)
        self.streamed_name = name
        self._known_version = self._version
        self._in_slot = None
        return self

    @property
    def was_written(self) -> bool:
        """Whether user code has written to it."""
        return self._version != self._known_version

    def forgive(self) -> None:
        """Called when its bytes were loaded again, which undoes what was written."""
        self._known_version = self._version

    @property
    def data(self) -> torch.Tensor:
        """The weight without gradients, in its shape and dtype, with the same bytes."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """Accepts only values that change nothing: itself and, until `settle`, a cast
        of itself, as `Module.to` gives it. Raises PenstockError otherwise."""
        is_same = value.data_ptr() == self.data_ptr()
        if is_same and (value.shape, value.stride()) == (self.shape, self.stride()):
            return
        if not _is_cast(value, self.detach()):
            raise written(self.streamed_name)
        if self._in_slot is None:
            self._in_slot = self.detach()
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def settle(self) -> None:
        """Returns to the bytes of the slot, if a cast of them took their place."""
        if self._in_slot is not None:
            torch.Tensor.data.__set__(self, self._in_slot)  # type: ignore[attr-defined]
            self._in_slot = None

    def __deepcopy__(self, memo: Any) -> nn.Parameter:
        """An ordinary parameter with the same values: the copy is not streamed."""
        if id(self) not in memo:
            copied = self.detach().clone(memory_format=torch.preserve_format)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad)
        found: nn.Parameter = memo[id(self)]
        return found


def _is_cast(value: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether `value` is `tensor` in another floating dtype."""
    return (
        value.shape == tensor.shape
        and value.is_floating_point()
        and value.dtype != tensor.dtype
        and torch.equal(value.to(tensor.dtype), tensor)
    )


def is_ours(tensor: torch.Tensor | None, name: str) -> bool:
    """Whether `tensor` is the weight `name` as Penstock bound it."""
    return type(tensor) is BoundParameter and tensor.streamed_name == name


def written(name: str) -> PenstockError:
    """The error that user code has written to the streamed weight `name`."""
    return PenstockError(
        f"the streamed weight {name!r} was written to, and the next load would undo "
        f"that: change it by penstock.update(model, {{{name!r}: tensor}})"
    )


def replaced(name: str) -> PenstockError:
    """The error that user code has replaced the streamed weight `name`."""
    return PenstockError(
        f"the streamed weight {name!r} was replaced in its module by something that "
        "would be lost: put other values there by "
        f"penstock.update(model, {{{name!r}: tensor}})"
    )
