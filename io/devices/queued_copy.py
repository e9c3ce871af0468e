"""Copies from host memory that the host does not wait for."""

import torch


def queued_to(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """`tensor`, which is on the CPU, on `device`: its copy is queued on the calling
    thread's current stream.

    The copy is read from pinned memory, since a copy from other memory would make the
    host wait for all work that is queued. On the CPU: `tensor` itself.
    """
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
