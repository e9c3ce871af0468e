"""One micro-batch's call of a row-wise module, and how several calls become one.

A module is row-wise if each row of its output depends on the same row of its inputs
alone. One joint call can then compute the rows of several callers.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .micro_batch import MicroBatch
from .thread_state import current_modes

Forward = Callable[..., Any]
_split_copy: Any = torch.split_with_sizes_copy  # torch's own types miss what it returns


@dataclass(eq=False, slots=True)
class RowCall:
    """The arguments of one call and, later, its result."""

    me: MicroBatch
    args: tuple[torch.Tensor, ...]
    num_rows: int
    together: "list[RowCall]" = field(default_factory=list)
    """The calls that this caller has to make jointly, its own included. Empty if
    another caller makes the joint call."""
    output: torch.Tensor | None = None
    is_alone: bool = False
    """Whether the call has to be made by itself: there is no other one to join, or the
    joint call failed."""

    def give(self, rows: torch.Tensor) -> None:
        """Stores its part of the output, (rows, width), in the shape of its input."""
        self.output = rows.view(*self.args[0].shape[:-1], rows.shape[-1])


def num_rows_of(args: tuple[Any, ...]) -> int:
    """The number of rows of `args`; 0 if these are not plain dense tensors of equally
    many rows."""
    for arg in args:
        if type(arg) is not torch.Tensor or arg.layout is not torch.strided:
            return 0
        if not arg.numel():
            return 0
        if arg is not args[0] and arg.shape[:-1] != args[0].shape[:-1]:
            return 0
    # Under vmap a tensor has more rows than its shape says.
    if not args or torch._C._functorch.peek_interpreter_stack() is not None:
        return 0
    first = args[0]
    return int(first.numel()) // int(first.shape[-1]) if first.dim() else 0


def key_of(args: Sequence[torch.Tensor]) -> Hashable:
    """What calls must have in common to be joined: width and dtype of each argument,
    and the part of torch's thread state that a call may depend on."""
    device = args[0].device
    is_autocast = torch.is_autocast_enabled(device.type)
    dispatch, function = current_modes()
    return (
        tuple([(arg.shape[-1], arg.dtype) for arg in args]),
        device,
        torch.is_inference_mode_enabled(),
        torch.get_autocast_dtype(device.type) if is_autocast else None,
        torch.get_default_dtype(),
        tuple([id(mode) for mode in (*dispatch, *function)]),
    )


def call_together(calls: Sequence[RowCall], forward: Forward) -> int:
    """Makes all `calls` by one call of `forward`. Returns the bytes of one output row.
    Raises TypeError if the output does not have one row for each row.

    Each caller gets a copy of its rows: a view would keep the rows of all callers alive
    as long as one of them keeps its own.
    """
    columns = zip(*(call.args for call in calls), strict=True)
    joined = [
        torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        for parts in columns
    ]
    output = forward(*joined)
    num_rows = [call.num_rows for call in calls]
    if type(output) is not torch.Tensor or output.shape[:-1] != (sum(num_rows),):
        raise TypeError("a row-wise module gives one row for each row")
    pieces = _split_copy(output, num_rows)
    for call, piece in zip(calls, pieces, strict=True):
        call.give(piece)
    return output.shape[-1] * output.itemsize
