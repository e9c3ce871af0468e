"""The shape of what one token adds to one layer of a cache, for a whole batch."""

from dataclasses import dataclass

import torch

from ..errors import UsageError


@dataclass(frozen=True, slots=True)
class KvShape:
    """Keys are [batch, key_heads, tokens, key_dim]; values are
    [batch, value_heads, tokens, value_dim] of the same dtype."""

    batch: int
    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> "KvShape":
        """The shape of `keys` and `values`, each [batch, heads, tokens, dim].

        Raises UsageError if they are not such a pair.
        """
        is_pair = (
            keys.dim() == values.dim() == 4
            and keys.dtype == values.dtype
            and keys.shape[0] == values.shape[0]
            and keys.shape[2] == values.shape[2]
        )
        if not is_pair:
            raise UsageError(
                f"keys {tuple(keys.shape)} {keys.dtype} and values "
                f"{tuple(values.shape)} {values.dtype} are not a pair of [batch, "
                "heads, tokens, dim]: set kv.tier to auto for this model"
            )
        return cls(
            keys.shape[0],
            keys.shape[1],
            keys.shape[3],
            values.shape[1],
            values.shape[3],
            keys.dtype,
        )

    @property
    def key_numel(self) -> int:
        """Elements of the keys of one token, for all sequences."""
        return self.batch * self.key_heads * self.key_dim

    @property
    def value_numel(self) -> int:
        """Elements of the values of one token, for all sequences."""
        return self.batch * self.value_heads * self.value_dim

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in the model's dtype, for all sequences."""
        return (self.key_numel + self.value_numel) * self.dtype.itemsize
