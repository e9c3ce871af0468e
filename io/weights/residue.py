"""The address of a tensor modulo 64 bytes: on a CPU the last bits of a matrix product
depend on that of the weight (see layout.py)."""

import torch

from .layout import TENSOR_ALIGNMENT


def residue_of(tensor: torch.Tensor) -> int:
    """Bytes, 0 to 63; 0 for what is not in the host's memory."""
    return tensor.data_ptr() % TENSOR_ALIGNMENT if tensor.device.type == "cpu" else 0


def clone_at(tensor: torch.Tensor, residue: int) -> torch.Tensor:
    """A contiguous copy of `tensor` (any dtype) in host memory, at an address
    that is `residue` modulo 64 bytes: a multiple of the size of an element."""
    nbytes = tensor.numel() * tensor.element_size()
    memory = torch.empty(nbytes + TENSOR_ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = (residue - memory.data_ptr()) % TENSOR_ALIGNMENT
    copy = memory[start : start + nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def clone_like(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of `tensor` on its device, with its residue."""
    if tensor.device.type != "cpu":
        return tensor.clone()
    return clone_at(tensor, residue_of(tensor))
