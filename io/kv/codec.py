"""Keys and values as rows of bytes, one for each token, and back."""

from typing import Protocol

import torch

from .shape import KvShape
from .strip import Pair


class Codec(Protocol):
    """A row is all that one token adds: keys [batch, heads, dim], then values."""

    row_bytes: int
    is_lossy: bool

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Rows, as uint8 [tokens * row_bytes], in memory of their own."""
        ...

    def decode(self, rows: torch.Tensor) -> Pair:
        """What `encode` made rows of; it may be views of them."""
        ...


class Plain:
    """As the model computes with them; decoded without a copy."""

    is_lossy = False

    def __init__(self, shape: KvShape) -> None:
        self._shape = shape
        self.row_bytes = shape.row_bytes

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
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
        shape = self._shape
        table = rows.view(shape.dtype).view(-1, shape.key_numel + shape.value_numel)
        return self._split(table)

    def _split(self, table: torch.Tensor) -> Pair:
        """Views [batch, heads, tokens, dim] of rows of elements."""
        shape = self._shape
        num = table.shape[0]
        keys = table[:, : shape.key_numel].view(
            num, shape.batch, shape.key_heads, shape.key_dim
        )
        values = table[:, shape.key_numel :].view(
            num, shape.batch, shape.value_heads, shape.value_dim
        )
        return keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)
