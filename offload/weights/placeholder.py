"""Placeholders for streamed parameters that are not loaded.

All can be asked of a placeholder except its values. A meta tensor would be silently
wrong (on the CPU, `F.linear(x, meta)` returns garbage). A placeholder knows its shape,
dtype and device; an operation on its values is a *fault*: the weights are loaded at
once, or the operation is refused.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ...io.errors import CheckpointError, PenstockError
from .bound_parameter import replaced, written

_PASS_ON = {
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
}
_APPLY: CodeType = torch.nn.Module._apply.__code__


class StreamedParameter(torch.Tensor):
    """A parameter whose values are not in memory. It counts as an `nn.Parameter`.

    `touch()` returns the loaded tensor, which is valid until the next operation.
    `gather(ids)`, if given, returns rows of an embedding table without loading the
    table. A view of a placeholder is a placeholder, so that a write through it is
    noticed.
    """

    _touch: Callable[[], torch.Tensor]
    _gather: Callable[[torch.Tensor], torch.Tensor] | None
    _name: str
    _is_param: bool

    @staticmethod
    def __new__(
        cls,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        touch: Callable[[], torch.Tensor],
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
        requires_grad: bool = False,
    ) -> "StreamedParameter":
        # Made outside of inference mode, or views of it would be inference tensors.
        with torch.inference_mode(False):
            self = torch.Tensor._make_wrapper_subclass(
                cls, shape, dtype=dtype, device=device, requires_grad=requires_grad
            )
        self._name = name
        self._touch = touch
        self._gather = gather
        self._is_param = True  # nn.Parameter's isinstance check reads this
        return self

    @classmethod
    def _view(
        cls, base: "StreamedParameter", like: torch.Tensor, touch: Any
    ) -> "StreamedParameter":
        """A view of `base` with the shape, strides and dtype of `like`, which is on
        meta."""
        with torch.inference_mode(False):
            self = torch.Tensor._make_wrapper_subclass(
                cls,
                like.shape,
                strides=like.stride(),
                storage_offset=int(like.storage_offset()),
                dtype=like.dtype,
                device=base.device,
            )
        self._name, self._touch, self._gather = base._name, touch, None
        self._is_param = False
        return self

    # Without this, methods would return instances of this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PASS_ON:
            return args[0]
        if func is torch.ops.aten.embedding.default and isinstance(args[0], cls):
            gather = args[0]._gather
            if gather is not None:
                return gather(args[1])
        if _is_cast_by_module():
            raise cast_in_place()
        if (target := _written_by(func, args, cls)) is not None:
            raise written(target._name)
        if func.is_view and isinstance(args[0], cls):
            return _views(func, args[0], args[1:], kwargs)

        def real(value: Any) -> Any:
            return value._touch() if isinstance(value, cls) else value

        return func(*tree_map(real, args), **tree_map(real, kwargs))

    def check_exists(self) -> None:
        """Raises CheckpointError if the checkpoint has no such tensor."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = list(self.shape)
        return f"StreamedParameter({self._name!r}, {shape}, {self.dtype}, not loaded)"

    @property
    def data(self) -> torch.Tensor:
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if value is not self:
            raise written(self._name)

    @property
    def __class__(self) -> type:
        return type(self)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        """Raises PenstockError: `torch.utils.swap_tensors` begins with this."""
        raise replaced(self._name)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise written(self._name)

    def __deepcopy__(self, memo: Any) -> Any:
        raise _not_here(self._name, "copied")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _not_here(self._name, "pickled or saved")

    def untyped_storage(self) -> Any:
        raise _not_here(self._name, "saved")

    def data_ptr(self) -> int:
        raise _not_here(self._name, "addressed")

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise _not_here(self._name, "turned into an array")

    def tolist(self) -> Any:
        raise _not_here(self._name, "turned into a list")


def is_away(module: torch.nn.Module, key: str) -> bool:
    """Whether the weight at `key` is streamed, and user code has put nothing there."""
    return isinstance(module._parameters.get(key), StreamedParameter)


class AbsentParameter(StreamedParameter):
    """A placeholder for a parameter that the checkpoint does not have. Using its values
    raises CheckpointError."""

    def check_exists(self) -> None:
        self._touch()


def absent_parameter(name: str, like: torch.Tensor, folder: Path) -> AbsentParameter:
    """A placeholder with the shape and dtype of `like`, for the model in `folder`."""

    def touch() -> torch.Tensor:
        raise CheckpointError(
            f"{folder} lacks {name}, which this needs: a checkpoint without a head can "
            "only embed"
        )

    shape, device = tuple(like.shape), torch.device("cpu")
    made = AbsentParameter(name, shape, like.dtype, device, touch)
    assert isinstance(made, AbsentParameter), "the class makes its own instances"
    return made


def _not_here(name: str, verb: str) -> PenstockError:
    return PenstockError(
        f"{name!r} is streamed and cannot be {verb}: use the checkpoint's own files, "
        "or penstock.unwrap(model) where the module was wrapped"
    )


def cast_in_place() -> PenstockError:
    """The error that user code casts or moves streamed weights."""
    return PenstockError(
        "streamed weights cannot be cast or moved in place: set dtype and "
        "device in the Policy and load the model again"
    )


def _written_by(
    func: Any, args: tuple[Any, ...], kind: type[StreamedParameter]
) -> StreamedParameter | None:
    """The placeholder that `func` would write to; None if there is none."""
    if not func._schema.is_mutable:
        return None
    for value, argument in zip(args, func._schema.arguments, strict=False):
        info = argument.alias_info
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, kind) and info is not None and info.is_write:
                return each
    return None


def _views(func: Any, base: StreamedParameter, args: Any, kwargs: Any) -> Any:
    """What the view operation `func` returns for `base`, as placeholders. The views of
    its values are made when they are used."""
    meta = torch.empty_strided(
        base.shape, base.stride(), dtype=base.dtype, device="meta"
    )
    found, shape = tree_flatten(func(meta, *args, **kwargs))

    def touch(index: int) -> torch.Tensor:
        views, _ = tree_flatten(func(base._touch(), *args, **kwargs))
        view: torch.Tensor = views[index]
        return view

    made = [
        StreamedParameter._view(base, like, partial(touch, index))
        for index, like in enumerate(found)
    ]
    return tree_unflatten(made, shape)


def _is_cast_by_module() -> bool:
    """Whether `Module.to`, `.half` or the like is running (all of them use
    `Module._apply`). Looked up only in the slow path of a fault."""
    frame = sys._getframe(2)
    for _ in range(8):
        if frame.f_code is _APPLY:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
