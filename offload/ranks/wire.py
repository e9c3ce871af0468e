"""Messages between ranks as bytes."""

import math
import socket
import struct
import time
from collections.abc import Callable

import torch

from ...scheduler.ranks.messages import Kind, Message
from ...scheduler.ranks.post import Empty, pageable
from ...scheduler.ranks.stages import Address

_HEAD = struct.Struct("<BBBiiiiiIIQ")
_DIM = struct.Struct("<q")
_MAX_DIMS = 16
_DTYPES: tuple[torch.dtype | None, ...] = (
    None,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
)

TOKEN_BYTES = 16
"""The size of the secret that all ranks know."""
GREETING_SECONDS = 5.0
"""How long one that connects may take to say who it is."""

Buffer = bytes | memoryview
Receive = Callable[[memoryview], None]
"""Fills a buffer with the next bytes."""


def packed(message: Message, *, copies: bool = True) -> list[Buffer]:
    """The bytes of `message`, in pieces. Its tensor, in host memory, is not copied
    without `copies`: nobody may change it then. Nor is one of uint8, which holds
    weights and is never changed."""
    tensor, text = message.tensor, message.text.encode()
    dims: tuple[int, ...] = ()
    data: Buffer = b""
    code = 0
    if tensor is not None:
        code, dims = _DTYPES.index(tensor.dtype), tuple(tensor.shape)
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        is_fixed = not copies or tensor.dtype is torch.uint8
        data = flat.numpy().data if is_fixed else flat.numpy().tobytes()
    head = _HEAD.pack(
        message.kind,
        code,
        len(dims),
        *message.address,
        message.stage,
        message.fingerprint,
        len(text),
        len(data),
    )
    return [head, b"".join(map(_DIM.pack, dims)) + text, data]


def unpacked(receive: Receive, empty: Empty = pageable) -> Message:
    """The next message; `empty` makes the memory of its tensor. Raises ValueError for
    what is none."""
    head = bytearray(_HEAD.size)
    receive(memoryview(head))
    (kind, code, num_dims, *rest) = _HEAD.unpack(head)
    *address, stage, fingerprint, num_text, num_data = rest
    if num_dims > _MAX_DIMS or code >= len(_DTYPES):
        raise ValueError("this is no message of a rank")
    more = bytearray(num_dims * _DIM.size + num_text)
    receive(memoryview(more))
    dims = [_DIM.unpack_from(more, n * _DIM.size)[0] for n in range(num_dims)]
    text = bytes(more[num_dims * _DIM.size :]).decode()
    tensor, dtype = None, _DTYPES[code]
    num_named = 0 if dtype is None else math.prod(dims) * dtype.itemsize
    if min(dims, default=0) < 0 or num_named != num_data:
        raise ValueError("this is no message of a rank")
    if dtype is not None:
        tensor = empty(dims, dtype)
        if num_data:
            receive(memoryview(tensor.view(-1).view(torch.uint8).numpy().data))
    return Message(Kind(kind), Address(*address), stage, fingerprint, text, tensor)


def greeted_by(there: socket.socket, secret: bytes) -> int | None:
    """The rank that `there` says it is, after the `secret` of all ranks; None for
    anybody else, who may send anything, or nothing."""
    end, num, found = time.monotonic() + GREETING_SECONDS, TOKEN_BYTES + 4, b""
    try:
        while len(found) < num:
            there.settimeout(max(end - time.monotonic(), 0.001))
            if not (more := there.recv(num - len(found))):
                return None
            found += more
            if found[:TOKEN_BYTES] != secret[: len(found)]:
                return None
    except OSError:
        return None
    return int.from_bytes(found[TOKEN_BYTES:], "big")
