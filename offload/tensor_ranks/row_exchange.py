"""Sends this rank's part of each output, and waits for those of the other ranks."""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...io.devices.crossing import Crossing
from ...io.errors import RanksError
from ...io.timeline import RANKS
from ...scheduler.ranks.messages import Kind, Message
from ...scheduler.ranks.post import Post
from ...scheduler.ranks.rank_statistics import RankStatistics
from ...scheduler.ranks.stages import PLAIN, Address, RankStages
from ...scheduler.ranks.unison import Unison
from ..ranks.exchange import Exchange
from ..ranks.outputs import diverged
from .cut_experts import CutExperts
from .cut_layers import CutLayer

_SHOWN_SECONDS = 1e-4
"""Shorter waits are counted, and not recorded."""
_CALLS = 30
"""The bits of a call's number that are in `Address.call`; the others are in
`attempt`."""


class RowExchange(Exchange):
    """The exchange of ranks that compute every micro-batch together: this one is the
    owner of all stages, of which it has its rows of each product in `layers`, and its
    range of the `experts`.

    Ranks make the same calls in the same order: each call is numbered, and checked
    against its layer, its micro-batch and its shape.
    """

    def __init__(
        self,
        post: Post,
        crossing: Crossing,
        blocks: Sequence[nn.Module],
        layers: Sequence[CutLayer],
        experts: Sequence[CutExperts] = (),
    ) -> None:
        owners = (post.rank,) * (len(blocks) + 2)
        super().__init__(post, RankStages(owners, post.rank, True), crossing, blocks)
        self.layers = layers
        self.experts = experts
        self._names = [*(one.name for one in layers), *(one.name for one in experts)]
        self._num_calls = 0
        self._broken: RanksError | None = None

    def new_run(self) -> Unison:
        self._num_runs += 1
        return Unison(self._post, self._num_runs)

    def on_head(
        self, compute: Callable[[], torch.Tensor], *, on_host: bool = False
    ) -> torch.Tensor:
        """Returns `compute()`: each rank has the same numbers."""
        found = compute()
        return found.cpu() if on_host else found

    def statistics(self) -> RankStatistics:
        return replace(super().statistics(), num_gathers=self._num_calls)

    def gather(self, index: int, part: torch.Tensor) -> torch.Tensor:
        """The output of layer `index`, of which this rank has computed `part`: its
        rows, in the last dimension. Raises RanksError; no call can succeed after
        that."""
        sizes = [high - low for low, high in self.layers[index].bounds]
        return self._gather(index, part.detach(), sizes, -1)

    def gather_pairs(
        self, index: int, part: torch.Tensor, sizes: Sequence[int]
    ) -> torch.Tensor:
        """What the experts `index` made of all pairs, [pairs, width], of which this
        rank has computed `part`. Each rank has as many pairs as `sizes` says. Raises as
        `gather`."""
        return self._gather(len(self.layers) + index, part.detach(), sizes, 0)

    def _gather(
        self, index: int, part: torch.Tensor, sizes: Sequence[int], dim: int
    ) -> torch.Tensor:
        """Joins the parts of all ranks, of the `sizes` along `dim`. All ranks know
        them."""
        if self._broken is not None:
            raise self._broken
        try:
            return self._gathered(index, part, sizes, dim)
        except RanksError as error:
            self._broken = error
            raise

    def _gathered(
        self, index: int, part: torch.Tensor, sizes: Sequence[int], dim: int
    ) -> torch.Tensor:
        self._num_calls += 1
        shapes = [torch.Size(_resized(part.shape, dim, size)) for size in sizes]
        mark = self._mark(shapes, part.dtype)
        copy = self._crossing.to_host(part.contiguous())
        own = self._address(self._post.rank)
        message = Message(Kind.OUTPUT, own, index, mark, tensor=copy)
        for rank in self._others:
            self._post.send(rank, message)
        self._num_sent += len(self._others)
        self._bytes_sent += len(self._others) * part.nbytes
        self._wait_for_all()
        parts: list[torch.Tensor] = []
        for rank, shape in enumerate(shapes):
            if rank == self._post.rank:
                parts.append(part)
                continue
            found = self._post.mail.take(self._address(rank), rank)
            is_same = found.stage == index and found.fingerprint == mark
            if not is_same or found.tensor.shape != shape:
                raise diverged(
                    f"product {self._num_calls} is of {self._name(index)} here, and of "
                    f"{self._name(found.stage)} on rank {rank}, or of other tokens"
                )
            parts.append(self._crossing.to_device(found.tensor))
        return torch.cat(parts, dim=dim)

    def _wait_for_all(self) -> None:
        post, mail = self._post, self._post.mail
        awaited = [(self._address(rank), rank) for rank in self._others]

        def have_come() -> bool:
            return all(mail.is_ready(*one) for one in awaited)

        post.collect()
        if have_come():
            return
        assert self._entry is not None, "it is attached before forwards run"
        start = time.perf_counter()
        post.wait(have_come)
        end = time.perf_counter()
        self._entry.rank_seconds += end - start
        if end - start > _SHOWN_SECONDS:
            self._entry.record(RANKS, "other ranks", start, end)

    def _address(self, rank: int) -> Address:
        """Where the part of `rank` of the present call is."""
        high, low = divmod(self._num_calls, 1 << _CALLS)
        return Address(PLAIN, rank, high, low)

    def _mark(self, shapes: Sequence[torch.Size], dtype: torch.dtype) -> int:
        """A checksum of what is the same on all ranks: which micro-batch this is, and
        what each rank has of its output."""
        assert self._entry is not None, "it is attached before forwards run"
        loop: Any = self._entry.loop_here()
        index = -1 if loop is None else loop.running.index
        said = index, [tuple(shape) for shape in shapes], str(dtype)
        return zlib.crc32(repr(said).encode())

    def _name(self, index: int) -> str:
        is_known = 0 <= index < len(self._names)
        return self._names[index] if is_known else f"layer {index}"


def _resized(shape: torch.Size, dim: int, size: int) -> list[int]:
    """`shape` with `size` elements along `dim`."""
    sizes = list(shape)
    sizes[dim] = size
    return sizes


class RowHooks:
    """Hooks on the layers of `exchange` that put the rows of all ranks together, until
    `remove`."""

    def __init__(self, exchange: RowExchange) -> None:
        self._handles = [
            layer.module.register_forward_hook(_gathering(exchange, index))
            for index, layer in enumerate(exchange.layers)
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _gathering(exchange: RowExchange, index: int) -> Callable[..., torch.Tensor]:
    def after(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return exchange.gather(index, output)

    return after
