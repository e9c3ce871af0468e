"""The residue of a tensor: its address modulo 64 bytes.

On a CPU the last bits of a matrix product depend on the residue of the weight; see
layout.py.
"""

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
    """A copy of `tensor` (any shape and dtype) on its device, of the same residue.

    It is contiguous on a CPU.
    """
    if tensor.device.type != "cpu":
        return tensor.clone()
    return clone_at(tensor, residue_of(tensor))
