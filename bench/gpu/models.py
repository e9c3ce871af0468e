"""Streamed models of any number of blocks, of a checkpoint that holds one.

The machine has no disk for 64 GB. So the checkpoint's file holds one block, and its
header names it as often as the model has blocks. Everything else is as for a user:
every block has its own place in memory, is read into it, and streamed from there.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import penstock
from gpu.common import Part
from gpu.shapes import Shape
from penstock import Policy
from penstock.io.checkpoint.index import Checkpoint, open_checkpoint
from penstock.offload.engine.build import build
from penstock.offload.model import _attach
from penstock.offload.settings.room import room_for
from penstock.offload.weights import hf

SHARED = Path("/dev/shm")
_SLACK_BYTES = 8192
"""What a block takes beside its weights, at most: alignment of its tensors."""


def write_one_block(folder: Path, shape: Shape, part: Part) -> None:
    """Writes an embedding, one block, a norm and a head, with random weights."""
    shape.config(1).save_pretrained(folder)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(shape.config(1)).bfloat16()
    generator = torch.Generator(part.device).manual_seed(0)
    tensors = {}
    for name, like in model.state_dict().items():
        kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": part.device}
        made = torch.ones(like.shape, **kind)
        if like.dim() > 1:
            made = torch.randn(like.shape, generator=generator, **kind) * 0.02
        tensors[name] = made.cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def repeated(folder: Path, shape: Shape, num_layers: int) -> Checkpoint:
    """The checkpoint in `folder`, with its block named `num_layers` times."""
    shape.config(num_layers).save_pretrained(folder)
    stored = open_checkpoint(folder)
    entries = dict(stored.entries)
    for name, entry in stored.entries.items():
        if ".layers.0." in name:
            for index in range(num_layers):
                other = name.replace(".layers.0.", f".layers.{index}.")
                entries[other] = replace(entry, name=other)
    return replace(stored, entries=entries)


@contextlib.contextmanager
def checkpoint_folder(
    part: Part, shape: Shape, *, in_memory: bool = True
) -> Iterator[Path]:
    """The checkpoint of one block: in shared memory if that is asked for and has room,
    else on the disk."""
    nbytes = shape.layer_bytes + 4 * shape.hidden * shape.vocabulary + (1 << 20)
    has_room = SHARED.is_dir() and shutil.disk_usage(SHARED).free > 2 * nbytes
    parent = SHARED if in_memory and has_room else part.work
    with tempfile.TemporaryDirectory(prefix="penstock-suite-", dir=parent) as folder:
        write_one_block(Path(folder), shape, part)
        yield Path(folder)


def host_bytes(shape: Shape, num_layers: int) -> int:
    """Bytes of host memory that so many blocks take."""
    return num_layers * (shape.layer_bytes + _SLACK_BYTES)


def settings(
    part: Part, shape: Shape, num_layers: int, num_slots: int
) -> dict[str, Any]:
    """The policy of a model whose blocks are all in host memory."""
    table = 2 * shape.hidden * shape.vocabulary
    block = shape.layer_bytes + _SLACK_BYTES
    return {
        "placement": {r"layers\.": "host", "": "device"},
        "device": str(part.device),
        "device_memory": num_slots * block + 2 * table + 2 * _SLACK_BYTES,
        "host_memory": host_bytes(shape, num_layers),
        # For a file in memory, bypassing the page cache gains nothing.
        "io": {"reader": "threads", "threads": 8, "direct": False, "cache": part.work},
    }


@contextlib.contextmanager
def opened(
    folder: Path, shape: Shape, num_layers: int, policy: Policy
) -> Iterator[Any]:
    """The streamed model of `num_layers` blocks."""
    checkpoint = repeated(folder, shape, num_layers)
    skeleton = hf.build(checkpoint, "bfloat16")
    room = room_for(policy)
    engine = build(skeleton.model, checkpoint, skeleton.recipes, policy, room=room)
    model: Any = _attach(skeleton.model, engine)
    try:
        yield model
    finally:
        penstock.unwrap(model)


@contextlib.contextmanager
def streamed(
    part: Part, shape: Shape, num_layers: int, num_slots: int = 4
) -> Iterator[Any]:
    """The streamed model: its blocks are in host memory, and `num_slots` of them on the
    device at one time."""
    policy = Policy(**settings(part, shape, num_layers, num_slots))
    with (
        checkpoint_folder(part, shape) as folder,
        opened(folder, shape, num_layers, policy) as model,
    ):
        yield model
