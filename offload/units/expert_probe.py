"""Finds out whether stacked experts compute each expert by itself.

Their forward takes the tokens of one expert after the other, and makes the same of
them. It runs on meta tensors, once with all experts and once with two of them, and each
of torch's operations in it is inspected: in every tensor, the elements in order are one
block for each expert, made of that expert's block of other tensors alone. So a range of
experts computes what it computes in the whole. This takes no memory for tensors.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..monitoring.show import human_bytes

_TOKENS = 3
_FEW = 2
_aten = torch.ops.aten
_VIEWS = (_aten.view, _aten._unsafe_view, _aten.reshape)
_SAME = (_aten.clone, _aten._to_copy, _aten.detach, _aten.alias)
_ALONG = {_aten.split: 2, _aten.split_with_sizes: 2, _aten.slice: 1}
"""The index of the argument that names the dimension."""


class _NotByExpert(Exception):
    """An operation mixes experts, or may do so."""


def num_dense_experts(module: nn.Module) -> int | None:
    """The number of the stacked experts `module`, each of which computes tokens of its
    own, by itself. None if it is something else, or not known."""
    own = [p for p in module._parameters.values() if p is not None]
    shapes = {parameter.shape[0] for parameter in own if parameter.dim() == 3}
    if len(shapes) != 1 or any(parameter.dim() != 3 for parameter in own):
        return None
    (num,) = shapes
    if num < _FEW or not _takes_one_tensor(module) or _holds_more(module):
        return None
    widths = {size for parameter in own for size in parameter.shape[1:]}
    return num if any(_is_by_expert(module, num, width) for width in widths) else None


def piece_of_experts(kind: type, module: nn.Module, num: int, num_all: int) -> Any:
    """A module of the class `kind` like `module`, with `num` of its `num_all` experts.
    Its parameters are still those of `module`."""
    piece: Any = object.__new__(kind)
    piece.__dict__.update(vars(module))
    for key, value in vars(module).items():
        if "experts" in key and type(value) is int and value == num_all:
            piece.__dict__[key] = num
    return piece


def experts_kept_whole(model: nn.Module, cut: Iterable[nn.Module]) -> str | None:
    """What to announce of the stacked experts of `model` that are not among those that
    are `cut`: they are loaded together. None if there are none."""
    known = set(cut)
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Experts")
        and not isinstance(module, nn.ModuleList | nn.ModuleDict)
        and module not in known
        and any(True for _ in module.parameters())
    }
    if not found:
        return None
    name, module = next(iter(found.items()))
    nbytes = max(sum(p.nbytes for p in each.parameters()) for each in found.values())
    others = f" and of {len(found) - 1} other layers" if len(found) > 1 else ""
    return (
        f"the experts of {name}{others} are loaded together, {human_bytes(nbytes)} a "
        f"layer, however few are chosen: a part of {type(module).__name__} cannot be "
        "computed by itself, as far as is known"
    )


def _takes_one_tensor(module: nn.Module) -> bool:
    try:
        arguments = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # it is compiled, or written in C
        return False
    return [a.kind for a in arguments] == [inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _holds_more(module: nn.Module) -> bool:
    """Whether something else may change what the forward computes."""
    parts = list(module.modules())
    others = [tensor for part in parts[1:] for tensor in part.parameters()]
    return bool([*others, *module.buffers()]) or "forward" in vars(module)


def _is_by_expert(module: nn.Module, num: int, width: int) -> bool:
    """Whether a forward of rows of `width` elements computes by expert."""
    seen = []
    for few in (num, _FEW):
        piece = piece_of_experts(type(module), module, few, num)
        stacks = {
            key: torch.empty((few, *p.shape[1:]), dtype=p.dtype, device="meta")
            for key, p in module._parameters.items()
            if p is not None
        }
        piece.__dict__["_parameters"] = stacks
        dtype = next(iter(stacks.values())).dtype
        rows = torch.empty(few * _TOKENS, width, dtype=dtype, device="meta")
        watch = _Watch(few, [rows, *stacks.values()])
        try:
            with torch.no_grad(), watch:
                made = type(module).forward(piece, rows)
            watch.check_output(made)
        except Exception:  # what does not run on meta cannot be judged
            return False
        seen.append(watch.seen)
    return seen[0] == seen[1] and any(kind is _aten.bmm for kind, *_ in seen[0])


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Allows operations that keep experts apart, and follows which tensors have a block
    for each of `num` experts."""

    def __init__(self, num: int, known: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[Any, ...]] = []
        """The operations so far, with their numbers and what each expert gets."""
        self._num = num
        self._known = {id(tensor): tensor for tensor in known}

    def check_output(self, made: Any) -> None:
        """Raises _NotByExpert unless `made` has one row for each row of the input."""
        if not self._is_known(made) or made.shape[:1] != (self._num * _TOKENS,):
            raise _NotByExpert("its output")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self._check(func, args, tensors)
        made = list(output) if isinstance(output, list | tuple) else [output]
        kind = func.overloadpacket
        plain = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        shapes = [(t.shape[0] / self._num, *t.shape[1:]) for t in made]
        self.seen.append((kind, "" if kind in _VIEWS else str(plain), *shapes))
        self._known.update({id(tensor): tensor for tensor in made})
        return output

    def _check(self, func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
        """Raises _NotByExpert unless each block of the output is made of that block of
        `tensors`."""
        kind = func.overloadpacket
        is_safe = all(map(self._is_known, tensors)) and not func._schema.is_mutable
        if torch.Tag.nondeterministic_seeded in func.tags or not is_safe:
            raise _NotByExpert(str(func))
        if kind in _VIEWS or kind in _SAME:
            return  # the order of the elements stays
        if any(tensor.shape[0] % self._num for tensor in tensors):
            raise _NotByExpert(str(func))
        is_pointwise = torch.Tag.pointwise in func.tags
        if kind is _aten.bmm or is_pointwise:
            shapes = {t.shape[:1] if kind is _aten.bmm else t.shape for t in tensors}
            if len(shapes) == 1:
                return
        elif kind in _ALONG:
            at = _ALONG[kind]
            if (args[at] if len(args) > at else 0) % args[0].dim():
                return
        elif kind is _aten.transpose and all(d % args[0].dim() for d in args[1:]):
            return
        raise _NotByExpert(str(func))

    def _is_known(self, value: Any) -> bool:
        return id(value) in self._known and value.dim() > 0
