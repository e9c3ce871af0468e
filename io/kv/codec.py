"""Converts keys and values to rows of bytes, one row for each token, and back."""

from typing import Protocol

import torch

from .layer_buffer import Pair
from .shape import KvShape


class Codec(Protocol):
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
        """Copies [batch, heads, tokens, dim] into rows; see `Codec.encode`."""
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
        """Views `rows` as [batch, heads, tokens, dim]; see `Codec.decode`."""
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
