"""Converts keys and values to rows of bytes, one row for each token, and back."""

from typing import Protocol

import torch

from ..codecs.codes import Codes
from ..codecs.kernels import Kernels, ScaleBlocks, ScaledNumbers
from ..extent import align_up
from .layer_buffer import Pair
from .shape import KvShape

_MOST_IN_GROUP = 32
_ROW_ALIGNMENT = 16
_CODES = {torch.int8: Codes.INT8, torch.float8_e4m3fn: Codes.FLOAT8_E4M3}
_LEAST_SCALE = 2.0**-14
"""The smallest normal float16. Elements below half of it become zero."""


class KvCodec(Protocol):
    """Converts between keys and values and rows of bytes.

    One row holds what one token adds: its keys [batch, heads, dim], then its values.
    """

    row_bytes: int
    is_lossy: bool
    """Whether decoded elements may differ from the encoded ones."""

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The rows of `keys` and `values` (each [batch, heads, tokens, dim]).

        Returns uint8 [tokens * row_bytes] in new memory, on the device of `keys`.
        """
        ...

    def decode(self, rows: torch.Tensor) -> Pair:
        """The keys and values of `rows` (uint8 [tokens * row_bytes]).

        Each is [batch, heads, tokens, dim] and may be a view of `rows`.
        """
        ...


class Plain:
    """Keeps the elements as the model computes with them; decodes without a copy."""

    is_lossy = False

    def __init__(self, shape: KvShape) -> None:
        self._shape = shape
        self.row_bytes = shape.row_bytes

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Copies [batch, heads, tokens, dim] into rows; see `KvCodec.encode`."""
        shape = self._shape
        num = keys.shape[2]
        with torch.inference_mode(False):
            rows = torch.empty(
                (num, shape.key_numel + shape.value_numel),
                dtype=shape.dtype,
                device=keys.device,
            )
        for part, new in zip(self._split(rows), (keys, values), strict=True):
            part.copy_(new)
        return rows.view(torch.uint8).view(-1)

    def decode(self, rows: torch.Tensor) -> Pair:
        """Views `rows` as [batch, heads, tokens, dim]; see `KvCodec.decode`."""
        shape = self._shape
        table = rows.view(shape.dtype).view(-1, shape.key_numel + shape.value_numel)
        return self._split(table)

    def _split(self, table: torch.Tensor) -> Pair:
        """Views [batch, heads, tokens, dim] of `table` [tokens, elements of a row]."""
        shape = self._shape
        num = table.shape[0]
        keys = table[:, : shape.key_numel].view(
            num, shape.batch, shape.key_heads, shape.key_dim
        )
        values = table[:, shape.key_numel :].view(
            num, shape.batch, shape.value_heads, shape.value_dim
        )
        return keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)


class Quantised:
    """Symmetric quantisation to `kind` (torch.int8 or torch.float8_e4m3fn).
    `kernels` are for the device of the rows.

    An element is its byte times the float16 scale of its group. A group has up to 32
    elements of one head of one token. Errors: the largest element of a group is exact
    up to the rounding of the scale. The others are off by at most half a step: 1/254 of
    the largest for int8, 1/16 of the element itself for fp8.
    """

    is_lossy = True

    def __init__(self, shape: KvShape, kind: torch.dtype, kernels: Kernels) -> None:
        self._shape = shape
        self._kind = kind
        self._kernels = kernels
        self._key_group = _group(shape.key_dim)
        self._value_group = _group(shape.value_dim)
        self._num_elements = shape.key_numel + shape.value_numel
        self._scales_at = align_up(self._num_elements, 2)
        self._num_key_scales = shape.key_numel // self._key_group
        num_scales = self._num_key_scales + shape.value_numel // self._value_group
        self._scales_end = self._scales_at + 2 * num_scales
        self.row_bytes = align_up(self._scales_end, _ROW_ALIGNMENT)

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Quantises [batch, heads, tokens, dim] into rows; see `KvCodec.encode`."""
        num = keys.shape[2]
        with torch.inference_mode(False):
            table = torch.zeros(
                (num, self.row_bytes), dtype=torch.uint8, device=keys.device
            )
        elements, scales = self._parts(table)
        split, cut = self._shape.key_numel, self._num_key_scales
        self._put(keys, self._key_group, elements[:, :split], scales[:, :cut])
        self._put(values, self._value_group, elements[:, split:], scales[:, cut:])
        return table.view(-1)

    def decode(self, rows: torch.Tensor) -> Pair:
        """New tensors [batch, heads, tokens, dim]; see `KvCodec.decode`."""
        shape = self._shape
        elements, scales = self._parts(rows.view(-1, self.row_bytes))
        split, cut = shape.key_numel, self._num_key_scales
        keys = self._get(elements[:, :split], scales[:, :cut], shape.key_heads)
        values = self._get(elements[:, split:], scales[:, cut:], shape.value_heads)
        return keys, values

    def _parts(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the elements and of the scales of each row."""
        elements = table[:, : self._num_elements].view(self._kind)
        scales = table[:, self._scales_at : self._scales_end].view(torch.float16)
        return elements, scales

    def _put(
        self,
        new: torch.Tensor,
        group: int,
        elements: torch.Tensor,
        scales: torch.Tensor,
    ) -> None:
        """Quantises `new` [batch, heads, tokens, dim] into `elements` and `scales`.

        Both have one row for each token.
        """
        num = new.shape[2]
        exact = new.permute(2, 0, 1, 3).reshape(num, -1, group).float()
        largest = 127.0 if self._kind == torch.int8 else torch.finfo(self._kind).max
        scale = exact.abs().amax(-1).div(largest).clamp(min=_LEAST_SCALE)
        scales.copy_(scale)
        steps = exact / scales.unsqueeze(-1).float()
        if self._kind == torch.int8:
            steps = steps.round()
        steps = steps.clamp(-largest, largest)
        elements.copy_(steps.reshape(num, -1).to(self._kind))

    def _get(
        self, elements: torch.Tensor, scales: torch.Tensor, heads: int
    ) -> torch.Tensor:
        """The inverse of `_put`: [batch, heads, tokens, dim] in the model's dtype."""
        num, numel = elements.shape
        with torch.inference_mode(False):
            made = torch.empty(
                (num, numel), dtype=self._shape.dtype, device=elements.device
            )
        numbers = ScaledNumbers(
            elements.view(torch.uint8),
            _CODES[self._kind],
            ScaleBlocks(1, numel // scales.shape[1]),
            scales.float().contiguous(),
            None,
            torch.float32,
        )
        self._kernels.write_scaled(made, numbers)
        return made.view(num, self._shape.batch, heads, -1).permute(1, 2, 0, 3)


def _group(dim: int) -> int:
    """The size of a group: the largest divisor of `dim` up to 32."""
    return max(size for size in range(1, _MOST_IN_GROUP + 1) if dim % size == 0)
