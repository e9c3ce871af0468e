"""What a stage returns, as what is sent of it to other ranks, and back."""

import zlib
from typing import Any

import torch

from ...io.errors import RanksError, UsageError
from ..weights.placeholder import StreamedParameter
from .stage_modules import LIST, TENSOR, kinds_of


def fingerprint(ids: torch.Tensor) -> int:
    """A checksum of the shape of `ids` and, on the CPU, of their values: of token ids,
    or of other inputs."""
    found = zlib.crc32(repr(tuple(ids.shape)).encode())
    if ids.device.type == "cpu":
        values = ids.detach().contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(values.numpy().tobytes(), found)
    return found


def sendable(output: Any, stage: int) -> tuple[torch.Tensor, str]:
    """The tensor of a stage's `output`, and what was returned, for `Message.text`."""
    kinds = kinds_of(output)
    if kinds is not None:
        return (output[0] if kinds else output), kinds
    raise UsageError(
        f"ranks cannot share this model: block {stage - 1} returns a "
        f"{type(output).__name__}, and no hidden states; run it on one rank"
    )


def returned(tensor: torch.Tensor, kinds: str, stage: int, source: int) -> Any:
    """What a stage of the rank `source` returns here, with `tensor` in its place."""
    if not kinds:
        return tensor
    others = kinds.removeprefix(LIST)[1:]
    values = [_not_sent(stage, source) if one == TENSOR else None for one in others]
    found = [tensor, *values]
    return found if kinds.startswith(LIST) else tuple(found)


def _not_sent(stage: int, source: int) -> torch.Tensor:
    """What stands for a value that a block returned beside its hidden states."""

    def touch() -> torch.Tensor:
        raise UsageError(
            f"ranks cannot share this model: another value than the hidden states of "
            f"block {stage - 1} is used elsewhere, and only rank {source} has it; run "
            "it on one rank"
        )

    name = f"a value of block {stage - 1}"
    return StreamedParameter(name, (1,), torch.float32, torch.device("cpu"), touch)


def diverged(what: str) -> RanksError:
    return RanksError(
        f"ranks run different things: {what}; give all ranks the same function and the "
        "same batches"
    )
