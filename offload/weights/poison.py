"""What stands in a module where a streamed parameter is not: everything can be asked
of it but its values.

A meta tensor would be silently wrong (on CPU, `F.linear(x, meta)` returns garbage).
This one knows its shape, dtype and device, and any operation on its values is a
*fault*: the weights are loaded on the spot, or the operation is refused.
"""

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ...io.errors import PenstockError

_PASS_ON = {
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
}
_APPLY: CodeType = torch.nn.Module._apply.__code__


class StreamedParameter(torch.Tensor):
    """A parameter whose values are not in memory. Counts as an `nn.Parameter`.

    `touch()` returns the real tensor, valid until the next operation; `gather(ids)`
    (where given) returns the rows `ids` of an embedding table without the table.
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
        # Outside of inference mode, or views of it would be inference tensors.
        with torch.inference_mode(False):
            self = torch.Tensor._make_wrapper_subclass(
                cls, shape, dtype=dtype, device=device, requires_grad=requires_grad
            )
        self._name = name
        self._touch = touch
        self._gather = gather
        self._is_param = True  # what nn.Parameter's isinstance check looks at
        return self

    # Without it, subclass methods would come back as instances of this class.
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
            raise PenstockError(
                "streamed weights cannot be cast or moved in place: set dtype and "
                "device in the Policy and load the model again"
            )

        if _writes_to(func, args, cls):
            raise PenstockError(
                f"{func} would write to streamed weights, which are read again at "
                "every pass: change the checkpoint instead"
            )

        def real(value: Any) -> Any:
            return value._touch() if isinstance(value, cls) else value

        return func(*tree_map(real, args), **tree_map(real, kwargs))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = list(self.shape)
        return f"StreamedParameter({self._name!r}, {shape}, {self.dtype}, not loaded)"

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


def _not_here(name: str, verb: str) -> PenstockError:
    return PenstockError(
        f"{name!r} is streamed and cannot be {verb}: use the checkpoint's own files, "
        "or penstock.unwrap(model) where the module was wrapped"
    )


def _writes_to(func: Any, args: tuple[Any, ...], kind: type) -> bool:
    schema = func._schema
    return schema.is_mutable and any(
        isinstance(value, kind)
        and argument.alias_info is not None
        and argument.alias_info.is_write
        for value, argument in zip(args, schema.arguments, strict=False)
    )


def _is_cast_by_module() -> bool:
    """Whether `Module.to`, `.half` and their like are at work (they all go through
    `Module._apply`). Looked up only on the slow path of a fault."""
    frame = sys._getframe(2)
    for _ in range(8):
        if frame.f_code is _APPLY:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
