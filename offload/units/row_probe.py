"""Finds out whether a module processes each row on its own.

Its forward runs once on meta tensors, and each of torch's operations in it is
inspected. Torch's own tags tell which operations are pointwise. This runs in the
calling thread and takes no memory for tensors.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BATCH, _LIST = (6, 5), (35,)
"""The two shapes that are tried: a batch of sequences, and a list of rows. One number
of rows is even and one is odd: a module that depends on the number is likely to treat
them differently."""
_FEW = 64
"""A tensor with fewer elements is compared by its values."""
_aten = torch.ops.aten
_VIEWS = (_aten.view, _aten._unsafe_view, _aten.reshape, _aten.expand)
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten.linear: 0}
"""The index of the argument that holds the rows."""
_ALONG = {
    _aten.split: 2,
    _aten.split_with_sizes: 2,
    _aten.slice: 1,
    _aten.mean: 1,
    _aten.sum: 1,
}
"""The index of the argument that names the dimension."""


class _NotRowWise(Exception):
    """An operation mixes rows, or may do so."""


def takes_rows_to_rows(module: nn.Module) -> bool:
    """Whether each row of the output of `module` depends only on the same row of its
    only argument.

    A row has all dimensions but the last as its index. The module may multiply rows
    with its weights, and apply pointwise operations. False also if that is not known.
    """
    parts = list(module.modules())
    if any(p.training or p._forward_hooks or p._forward_pre_hooks for p in parts):
        return False
    width = _width(module)
    if width is None:
        return False
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    meta = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    seen = []
    for shape in (_BATCH, _LIST):
        rows = torch.empty((*shape, width), dtype=dtype, device="meta")
        try:
            with _left_as_it_was(module), torch.no_grad(), _Watch(rows, meta) as watch:
                output = functional_call(module, meta, (rows,))
            watch.check_rows(output)
        except Exception:  # a module that does not run on meta cannot be judged
            return False
        seen.append(watch.seen)
    # Both shapes went through the same operations with the same numbers.
    return seen[0] == seen[1] and any(kind in _PRODUCTS for kind, *_ in seen[0])


def _width(module: nn.Module) -> int | None:
    """The width of the rows of the only argument, from the first matrix product in
    `module`."""
    try:
        arguments = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # it is compiled, or written in C
        return None
    if [a.kind for a in arguments] != [inspect.Parameter.POSITIONAL_OR_KEYWORD]:
        return None
    for part in module.modules():
        if type(part) is nn.Linear:
            return part.in_features
        if type(part).__name__ == "Conv1D":  # its weight is [inputs, outputs]
            weight = part._parameters.get("weight")
            return None if weight is None else weight.shape[0]
    return None


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Raises _NotRowWise if the forward changes attributes of a module, and restores
    them."""
    parts = list(module.modules())
    kept = [_attributes(part) for part in parts]
    try:
        yield
    finally:
        changed = False
        for part, before in zip(parts, kept, strict=True):
            now = _attributes(part)
            for space, values in before.items():
                if {k: id(v) for k, v in values.items()} != {
                    k: id(v) for k, v in now[space].items()
                }:
                    changed = True
                    target = vars(part) if space == "" else vars(part)[space]
                    target.clear()
                    target.update(values)
        if changed:
            raise _NotRowWise("it keeps something")


def _attributes(part: nn.Module) -> dict[str, dict[str, Any]]:
    """The attributes, tensors and modules that a forward may set."""
    spaces = ("_parameters", "_buffers", "_modules")
    found = {name: dict(vars(part)[name]) for name in spaces}
    return {**found, "": dict(vars(part))}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Allows operations that keep rows apart, and follows which tensors hold rows."""

    def __init__(self, rows: torch.Tensor, known: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[Any, ...]] = []
        """The operations so far, with the numbers and weights that they used."""
        self._names = {id(tensor): name for name, tensor in known.items()}
        self._shape = rows.shape[:-1]
        self._num_rows = rows.shape[:-1].numel()
        self._rows: dict[int, torch.Tensor] = {id(rows): rows}
        """The tensors that hold rows, by id. They are kept, so that no id is used
        again."""

    def check_rows(self, output: Any) -> None:
        """Raises _NotRowWise unless `output` has one row for each row of the input."""
        if not self._is_rows(output) or output.shape[:-1] != self._shape:
            raise _NotRowWise("its output")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        values = tree_leaves((args, kwargs))
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _NotRowWise(str(func))
        if not any(self._is_rows(value) for value in values):
            # It may use weights, or numbers that depend on the number of rows.
            self._note(func, values)
            return output
        if not any(self._is_rows(value) for value in (*args, *kwargs.values())):
            raise _NotRowWise(str(func))  # the rows are in a list
        if func._schema.is_mutable:
            raise _NotRowWise(str(func))
        self._check(func, args)
        if func.overloadpacket not in _VIEWS:
            self._note(func, values)
        made = output if isinstance(output, list | tuple) else [output]
        for tensor in made:
            if not self._keeps_rows(tensor):
                raise _NotRowWise(str(func))
            self._rows[id(tensor)] = tensor
        return output

    def _note(self, func: Any, values: list[Any]) -> None:
        self.seen.append((func.overloadpacket, *map(self._number, values)))

    def _number(self, value: Any) -> Any:
        """A value that identifies `value`, whatever the number of rows."""
        if not isinstance(value, torch.Tensor):
            return str(value)
        if value.is_meta:  # a tensor of the module, or a result
            return self._names.get(id(value))
        return value.tolist() if value.numel() < _FEW else id(value)

    def _check(self, func: Any, args: Any) -> None:
        kind = func.overloadpacket
        others = [a for a in args if isinstance(a, torch.Tensor)]
        others = [tensor for tensor in others if not self._is_rows(tensor)]
        if kind in _PRODUCTS:
            at = _PRODUCTS[kind]
            if not self._is_rows(args[at]) or len(others) < len(args[: at + 2]) - 1:
                raise _NotRowWise(str(func))
        elif kind in _ALONG:
            self._check_dimension(func, args, _ALONG[kind])
        elif kind in _VIEWS:
            if args[0].shape[-1] != list(args[1])[-1] and list(args[1])[-1] != -1:
                raise _NotRowWise(str(func))
        elif torch.Tag.pointwise in func.tags or kind in (_aten._to_copy, _aten.clone):
            if any(tensor.dim() > 1 for tensor in others):
                raise _NotRowWise(str(func))
        else:
            raise _NotRowWise(str(func))

    def _check_dimension(self, func: Any, args: Any, at: int) -> None:
        """Raises _NotRowWise unless the operation is along the last dimension."""
        asked = args[at] if len(args) > at else 0
        for dim in asked if isinstance(asked, list | tuple) else [asked]:
            if dim % args[0].dim() != args[0].dim() - 1:
                raise _NotRowWise(str(func))

    def _is_rows(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and id(value) in self._rows

    def _keeps_rows(self, tensor: Any) -> bool:
        if not isinstance(tensor, torch.Tensor) or not tensor.dim():
            return False
        leading = tensor.shape[:-1]
        return leading in (self._shape, torch.Size([self._num_rows]))
