"""Plans how a unit is copied from other memory into its slot, in few large runs. Pure.

On a CPU a slot lies as the unit's layout says, so one run copies it whole. On a GPU
tensors must be aligned (cuBLAS is slow below 16 bytes), and those that were read from a
file are not. Neighbouring tensors mostly need the same shift, so one run can move many.

The alignment is 256 bytes. Torch tells cuBLASLt how far pointers are aligned, up to
this value. With less, cuBLASLt could choose another kernel than for the resident model,
and the last bits would differ.
"""

from dataclasses import dataclass, replace

import torch

from ..extent import align_up
from .layout import Layout, Placed
from .steps import Decode

_TENSOR_ALIGNMENT = 256
SLOT_ALIGNMENT = 512
"""Bytes; on a GPU, the same as torch's allocator."""


@dataclass(frozen=True, slots=True)
class Run:
    """A byte range that is copied at once."""

    source_offset: int
    target_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """The plan to copy one unit from where it was read to into a slot of `nbytes`."""

    name: str
    nbytes: int
    runs: tuple[Run, ...]
    tensors: tuple[Placed, ...]
    """Where each parameter lies in the slot."""
    stored_bytes: int
    """Bytes of the checkpoint that make the unit."""
    decodes: tuple[Decode, ...] = ()
    """What is decoded into the slot, if the other memory holds a stored image; see
    `StoredImage`."""

    @property
    def moved_bytes(self) -> int:
        """Bytes that are copied from the other memory."""
        runs = sum(run.nbytes for run in self.runs)
        return runs + sum(decode.stored_bytes for decode in self.decodes)


def same_layout(plan: "Layout | Transfer") -> Transfer:
    """A transfer of a unit that lies as `plan` says, into a slot where it lies just so:
    one run copies it whole."""
    runs = (Run(0, 0, plan.nbytes),)
    return Transfer(plan.name, plan.nbytes, runs, plan.tensors, plan.stored_bytes)


def packed(plan: Layout, *, alignment: int, max_gap_bytes: int) -> Transfer:
    """A transfer to a slot where parameters are aligned and large gaps are left out.

    A run begins at a multiple of `alignment` bytes. It goes on as long as the next
    parameter is aligned in it (to 256 bytes, or `alignment` if that is less) and at
    most `max_gap_bytes` behind the last one. Each fragment of a parameter is a run of
    its own.
    """
    aligned_to = min(alignment, _TENSOR_ALIGNMENT)
    runs: list[Run] = []
    placed: dict[str, Placed] = {}
    can_go_on = True
    for tensor in sorted(plan.tensors, key=lambda tensor: tensor.offset):
        nbytes = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        if not nbytes:
            placed[tensor.name] = replace(tensor, offset=0)
            continue
        run = runs[-1] if runs else None
        end = run.target_offset + run.nbytes if run is not None else 0
        if tensor.fragments:
            base = align_up(end, alignment)
            parts = tensor.fragments
            runs += (Run(p.offset, base + p.start, p.nbytes) for p in parts)
            placed[tensor.name] = replace(tensor, offset=base, fragments=())
            can_go_on = False
            continue
        if (
            run is None
            or not can_go_on
            or not _goes_on(run, tensor.offset, aligned_to, max_gap_bytes)
        ):
            run = Run(tensor.offset, align_up(end, alignment), 0)
            runs.append(run)
            can_go_on = True
        ahead = tensor.offset - run.source_offset
        runs[-1] = replace(run, nbytes=max(run.nbytes, ahead + nbytes))
        placed[tensor.name] = replace(tensor, offset=run.target_offset + ahead)
    end = runs[-1].target_offset + runs[-1].nbytes if runs else 0
    return Transfer(
        plan.name,
        max(align_up(end, alignment), alignment),
        tuple(runs),
        tuple(placed[tensor.name] for tensor in plan.tensors),
        plan.stored_bytes,
    )


def _goes_on(run: Run, offset: int, aligned_to: int, max_gap_bytes: int) -> bool:
    ahead = offset - run.source_offset
    is_aligned = (run.target_offset + ahead) % aligned_to == 0
    return is_aligned and ahead - run.nbytes <= max_gap_bytes
