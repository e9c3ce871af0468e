"""The residue of a tensor: its address modulo 64 bytes.

On a CPU the last bits of a matrix product depend on the residue of the weight; see
layout.py.
"""

from collections.abc import Sequence

import torch

from .layout import TENSOR_ALIGNMENT


def residue_of(tensor: torch.Tensor) -> int:
    """The residue of `tensor` (any shape and dtype): 0 to 63 bytes.

    0 for a tensor that is not in host memory.
    """
    return tensor.data_ptr() % TENSOR_ALIGNMENT if tensor.device.type == "cpu" else 0


def clone_at(tensor: torch.Tensor, residue: int) -> torch.Tensor:
    """A contiguous copy of `tensor` (any shape and dtype) in host memory.

    Its address is `residue` modulo 64 bytes. Raises RuntimeError unless `residue` is a
    multiple of the element size.
    """
    nbytes = tensor.numel() * tensor.element_size()
    memory = torch.empty(nbytes + TENSOR_ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = (residue - memory.data_ptr()) % TENSOR_ALIGNMENT
    copy = memory[start : start + nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def clone_like(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the weight `tensor` (any shape and dtype), which computes its bits.

    It is on its device, of its residue, and has its `requires_grad`: torch chooses
    kernels by that.

    It is contiguous on a CPU.
    """
    with torch.inference_mode(False):
        if tensor.device.type != "cpu":
            copy = tensor.detach().clone()
        else:
            copy = clone_at(tensor.detach(), residue_of(tensor))
        return copy.requires_grad_(tensor.requires_grad)


def joined_like(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weight of which `pieces` are ranges along the first dimension, in order. It
    has the residue and the `requires_grad` of the first one."""
    with torch.inference_mode(False):
        whole = torch.cat([piece.detach() for piece in pieces])
        if (residue := residue_of(pieces[0])) != residue_of(whole):
            whole = clone_at(whole, residue)
        return whole.requires_grad_(pieces[0].requires_grad)
