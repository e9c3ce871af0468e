"""Makes the slot of a unit from its stored image, on the device of the slot."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..closing import Closing
from ..codecs.kernels import Kernels
from ..codecs.whole import WHOLE
from ..devices.device import Device, Stream
from ..event import Event
from ..extent import align_up
from ..memory.arena import Memory
from .decoding import parts_of
from .recipe import Recipe
from .steps import Decode, Input, raw_extent
from .transfer import Transfer

_MOST_BYTES = 4 << 20
"""Bytes of a half of the scratch, unless what cannot be cut has more."""
_LEAST_BYTES = 16 << 10
_ALIGNMENT = 256
_NUM_HALVES = 2
_CUT_BYTES = _MOST_BYTES - (64 << 10)
"""Bytes of the parts that are decoded, without what alignment adds."""
_BYTES_EACH = 16
"""Bytes of temporaries for each number; see `Whole`."""


@dataclass(frozen=True, slots=True)
class Image:
    """Where the image of a unit lies."""

    memory: Memory
    start: int
    """Its offset there, in bytes."""
    cut: Callable[[int, int], Iterator[tuple[int, int]]]
    """Splits a range of `memory` into those that are copied one by one; see
    `Source.cut`."""


class Unpacker(Closing):
    """Makes slots in `target`, memory of `device`, of what `copies` brings there.

    Where the device is the host, decodes read the image where it lies. Otherwise its
    bytes are copied to one half of a scratch, while those in the other half are
    decoded by a stream of their own. Only one thread uses it.
    """

    def __init__(
        self, device: Device, target: Memory, copies: Stream, kernels: Kernels
    ) -> None:
        self._device = device
        self._target = target
        self._copies = copies
        self._kernels = kernels
        self._scratch: Memory | None = None
        self._half = 0
        self._used: list[Event | None] = [None] * _NUM_HALVES
        """When the decodes from each half are done."""

    @cached_property
    def _stream(self) -> Stream:
        return self._device.stream()

    def fill(self, transfer: Transfer, image: Image, slot: int) -> None:
        """Makes the slot at the offset `slot` of the target from `image`, as `transfer`
        says: copies what lies as it is used, and decodes the rest.

        Decodes begin after the copies so far; later copies begin when they are done.
        """
        ahead = slot - image.start
        for run in transfer.runs:
            shift = ahead + run.target_offset - run.source_offset
            start = image.start + run.source_offset
            for offset, nbytes in image.cut(start, run.nbytes):
                self._copies.copy(
                    self._target.tensor(offset + shift, nbytes),
                    image.memory.tensor(offset, nbytes),
                )
        if not transfer.decodes:
            return
        self._stream.wait(self._copies.record())
        try:
            self._unpack(transfer.decodes, image, slot)
        finally:
            self._copies.wait(self._stream.record())

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.close()

    def _unpack(self, decodes: Sequence[Decode], image: Image, slot: int) -> None:
        for decode in decodes:
            size = decode.target_dtype.itemsize
            flat = self._target.tensor(
                slot + decode.target_offset, decode.target_numel * size
            )
            target = decode.target.on(flat.view(decode.target_dtype))
            if self._device.is_host:
                self._decode(decode, _seen(decode.inputs, image), target)
                continue
            for inputs, rows in parts_of(decode, target, _CUT_BYTES):
                self._decode_there(decode, inputs, image, rows)

    def _decode(
        self, decode: Decode, stored: Sequence[torch.Tensor], target: torch.Tensor
    ) -> None:
        self._stream.run(lambda: decode.codec.decode(stored, target, self._kernels))

    def _decode_there(
        self,
        decode: Decode,
        inputs: Sequence[Input],
        image: Image,
        target: torch.Tensor,
    ) -> None:
        sizes = [align_up(each.extent.nbytes, _ALIGNMENT) for each in inputs]
        scratch, at = self._room(sum(sizes))
        if (earlier := self._used[self._half]) is not None:
            self._copies.wait(earlier)
        stored = []
        for each, size in zip(inputs, sizes, strict=True):
            start, nbytes = image.start + each.extent.offset, each.extent.nbytes
            for offset, length in image.cut(start, nbytes) if nbytes else ():
                self._copies.copy(
                    scratch.tensor(at + offset - start, length),
                    image.memory.tensor(offset, length),
                )
            stored.append(each.view.on(_elements(scratch, at, nbytes, each)))
            at += size
        self._stream.wait(self._copies.record())
        self._decode(decode, stored, target)
        self._used[self._half] = self._stream.record()
        self._half = (self._half + 1) % _NUM_HALVES

    def _room(self, nbytes: int) -> tuple[Memory, int]:
        """The scratch, and where `nbytes` of its next half begin."""
        if self._scratch is None or self._scratch.nbytes < _NUM_HALVES * nbytes:
            if self._scratch is not None:
                self._scratch.close()
            self._scratch = self._device.allocate(_NUM_HALVES * _half_of(nbytes))
            self._used = [None] * _NUM_HALVES
        return self._scratch, self._half * (self._scratch.nbytes // _NUM_HALVES)


def scratch_bytes(recipes: Iterable[Recipe]) -> int:
    """Bytes that an `Unpacker` needs on an accelerator, beside the slots, to make
    `recipes` of what is stored."""
    half = numel = 0
    seen = set()
    for recipe in recipes:
        for part in recipe.slices:
            if not part.target.numel or raw_extent(recipe, part) is not None:
                continue
            kind = part.codec, part.stored_bytes, part.target.numel
            if kind in seen:
                continue
            seen.add(kind)
            whole = part.stored_bytes + _ALIGNMENT * len(part.entries)
            is_cut = any(part.codec.rows_each) and part.source.is_contiguous
            half = max(half, min(whole, _CUT_BYTES) if is_cut else whole)
            if part.codec.uses_kernels:
                numel = max(numel, min(part.target.numel, WHOLE.most_numel))
    return (_NUM_HALVES * _half_of(half) if half else 0) + _BYTES_EACH * numel


def _half_of(nbytes: int) -> int:
    """Bytes of a half in which `nbytes` are decoded: it grows a few times at most."""
    return max(_LEAST_BYTES, 1 << (nbytes - 1).bit_length())


def _seen(inputs: Sequence[Input], image: Image) -> list[torch.Tensor]:
    """The stored tensors where they lie."""
    found = []
    for each in inputs:
        start = image.start + each.extent.offset
        content = _elements(image.memory, start, each.extent.nbytes, each)
        found.append(each.view.on(content))
    return found


def _elements(memory: Memory, offset: int, nbytes: int, of: Input) -> torch.Tensor:
    """Bytes of `memory` as elements: one-dimensional, a view where they are aligned."""
    if not nbytes:
        return memory.tensor(0, 1)[:0].view(of.dtype)
    found = memory.tensor(offset, nbytes)
    if found.data_ptr() % of.dtype.itemsize:
        found = found.clone()
    return found.view(of.dtype)
