"""The contract of a layer buffer: the keys and values of one layer of one cache."""

from abc import abstractmethod
from typing import Protocol

import torch

from ..closing import Closing
from .shape import KvShape

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each [batch, heads, tokens, dim]."""


class Lease(Protocol):
    """Bytes taken from the budget of one tier."""

    tier: str

    def resize(self, nbytes: int) -> None:
        """Changes the lease to `nbytes`.

        Raises DoesNotFitError when the budget has too little; the lease stays then.
        """
        ...

    def give_back(self) -> None:
        """Returns all bytes to the budget."""
        ...


class KvLayerBuffer(Closing):
    """The keys and values of one layer of one cache.

    Tokens are numbered from the beginning of the sequence; those from `first` up to
    `length` are kept. The tensors that `append` and `view` return stay valid until a
    method other than `append` changes the buffer.
    """

    shape: KvShape
    first: int = 0
    length: int = 0

    def __del__(self) -> None:
        self.close()  # the cache that it belonged to is gone

    @property
    @abstractmethod
    def device_bytes(self) -> int:
        """Bytes of the device's own budget that it holds between its uses."""

    def prefetch(self) -> bool:
        """Starts to fetch the tokens, which will probably be used soon.

        Returns False if there is no room for them now.
        """
        return True

    @abstractmethod
    def append(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> Pair:
        """Adds `keys` and `values`, each [batch, heads, new tokens, dim].

        Returns all tokens from number `start` on, the new ones included. Raises
        DoesNotFitError when the tier has no room for them.
        """

    def skip(self, num: int) -> None:
        """Leaves out the first `num` tokens. Call it before anything is appended."""
        assert self.length == 0, "tokens that are kept cannot be skipped"
        self.first = self.length = num

    @abstractmethod
    def view(self, start: int) -> Pair:
        """All tokens from number `start` on."""

    @abstractmethod
    def forget(self, before: int) -> None:
        """Drops the tokens before number `before`: nobody will ask for them again."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Removes all tokens from number `length` on."""

    @abstractmethod
    def select(self, rows: torch.Tensor) -> None:
        """Replaces sequence i by sequence `rows[i]`, for all i.

        `rows` is int64 [new batch]; the batch may grow or shrink.
        """
