"""A streamed weight while it is in memory, and how a write to it is noticed."""

from typing import Any

import torch
from torch import nn

from ...io.errors import PenstockError


class BoundParameter(nn.Parameter):
    """A parameter whose bytes are a slot's. Reading it is reading any parameter.

    Every write through torch raises the version counter, that through `data` too:
    here `data` shares the counter, where a plain parameter's has one of its own.
    """

    streamed_name: str
    _known_version: int

    @staticmethod
    def of(name: str, tensor: torch.Tensor, requires_grad: bool) -> "BoundParameter":
        """The parameter `name`, a view of `tensor`. Called outside of inference mode.
        What a device copies into the slot raises the counter of the slot: `tensor.data`
        has another one."""
        self = BoundParameter(tensor.data, requires_grad=requires_grad)
        self.streamed_name = name
        self._known_version = self._version
        return self

    @property
    def was_written(self) -> bool:
        """Whether anybody but the loader has written to it."""
        return self._version != self._known_version

    def forgive(self) -> None:
        """Its bytes were loaded again: what was written is gone."""
        self._known_version = self._version

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        is_same = value.data_ptr() == self.data_ptr()
        if not is_same or (value.shape, value.stride()) != (self.shape, self.stride()):
            raise written(self.streamed_name)

    def __deepcopy__(self, memo: Any) -> nn.Parameter:
        """A parameter like any other: the copy is not streamed."""
        if id(self) not in memo:
            copied = self.detach().clone(memory_format=torch.preserve_format)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad)
        found: nn.Parameter = memo[id(self)]
        return found


def is_ours(tensor: torch.Tensor | None, name: str) -> bool:
    """Whether this is the weight `name` as Penstock put it there."""
    return type(tensor) is BoundParameter and tensor.streamed_name == name


def written(name: str) -> PenstockError:
    """Somebody wrote to the streamed weight `name`."""
    return PenstockError(
        f"the streamed weight {name!r} was written to, and the next load would undo "
        f"that: change it by penstock.update(model, {{{name!r}: tensor}})"
    )


def replaced(name: str) -> PenstockError:
    """Something else stands where the streamed weight `name` was."""
    return PenstockError(
        f"the streamed weight {name!r} was replaced in its module by something that "
        "would be lost: put other values there by "
        f"penstock.update(model, {{{name!r}: tensor}})"
    )
