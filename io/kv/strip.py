"""The keys and values of one layer of one cache: a strip, which grows at its end."""

from abc import abstractmethod
from typing import Protocol

import torch

from ..closing import Closing
from .shape import KvShape

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each [batch, heads, tokens, dim]."""


class Lease(Protocol):
    """Bytes that were taken from the budget of a tier."""

    tier: str

    def resize(self, nbytes: int) -> None:
        """Raises DoesNotFitError, and leaves it as it is."""
        ...

    def give_back(self) -> None: ...


class KvLayerBuffer(Closing):
    """Tokens are known by their number since the beginning: those from `first` up to
    `length` are kept. What `append` and `view` return is read at once, or kept: it
    stays as it is until the strip is changed other than by `append`."""

    shape: KvShape
    first: int = 0
    length: int = 0

    def __del__(self) -> None:
        self.close()  # with the cache that it belonged to

    @property
    @abstractmethod
    def device_bytes(self) -> int:
        """Bytes of the device's own budget that it takes while its micro-batch
        waits."""

    def prefetch(self) -> bool:
        """It will probably be used soon. False if there is no room for it now."""
        return True

    @abstractmethod
    def append(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> Pair:
        """Adds tokens; returns all from `start` on, the new ones included."""

    def skip(self, num: int) -> None:
        """The first `num` tokens are never kept. Before anything is appended."""
        assert self.length == 0, "what is there cannot be skipped"
        self.first = self.length = num

    @abstractmethod
    def view(self, start: int) -> Pair:
        """All tokens from `start` on."""

    @abstractmethod
    def forget(self, before: int) -> None:
        """Nobody will ask for tokens before `before` any more."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Takes back all tokens from `length` on."""

    @abstractmethod
    def select(self, rows: torch.Tensor) -> None:
        """Sequence i becomes what sequence `rows[i]` is; there may be more or less
        than before."""
