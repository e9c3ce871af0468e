"""Streams and scores through Penstock's public API: a checkpoint, hooks, a sweep, a
scorer.

The machine has no disk for 64 GB. So the checkpoint's file holds one block, and its
header names it as often as the model has blocks. It is in shared memory if there is
room. Everything else is as for a user: every block is read into pinned host memory of
its own, and streamed from there.

Takes at most 90 seconds; needs a GPU with 20 GB, and 90 GB of host memory for all
blocks (with less it has fewer).
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import penstock
from gpu.common import Part
from gpu.shapes import Shape, block_flops, shape_and_layers, token_ids
from penstock import Policy
from penstock.io.checkpoint.index import Checkpoint, open_checkpoint
from penstock.offload.engine.build import build
from penstock.offload.model import _attach
from penstock.offload.settings.room import room_for
from penstock.offload.tasks.head import CausalScorer
from penstock.offload.weights import hf

SHARED = Path("/dev/shm")
IN_FLIGHT = (2, 8)
LOGITS_BYTES = 1 << 30


def write_one_block(folder: Path, shape: Shape, part: Part) -> None:
    """Writes an embedding, one block, a norm and a head, with random weights."""
    shape.config(1).save_pretrained(folder)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(shape.config(1)).bfloat16()
    tensors = {}
    for name, like in model.state_dict().items():
        kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": part.device}
        made = torch.ones(like.shape, **kind)
        if like.dim() > 1:
            made = torch.randn(like.shape, **kind) * 0.02
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
def checkpoint_folder(part: Part, shape: Shape) -> Iterator[Path]:
    nbytes = shape.layer_bytes + 4 * shape.hidden * shape.vocabulary + (1 << 20)
    has_room = SHARED.is_dir() and shutil.disk_usage(SHARED).free > 2 * nbytes
    parent = SHARED if has_room else part.work
    with tempfile.TemporaryDirectory(prefix="penstock-suite-", dir=parent) as folder:
        write_one_block(Path(folder), shape, part)
        yield Path(folder)


@contextlib.contextmanager
def streamed(
    part: Part, shape: Shape, num_layers: int, num_slots: int = 4
) -> Iterator[Any]:
    """The streamed model: its blocks are in host memory, and `num_slots` of them on the
    device at one time."""
    table = 2 * shape.hidden * shape.vocabulary
    slots = num_slots * (shape.layer_bytes + 65536) + 2 * table
    policy = Policy(
        device=str(part.device),
        device_memory=max(slots, 1 << 20),
        host_memory=num_layers * (shape.layer_bytes + 65536) + 2 * table,
        # For a file in memory, bypassing the page cache gains nothing.
        io={"reader": "threads", "threads": 8, "direct": False, "cache": part.work},
    )
    with checkpoint_folder(part, shape) as folder:
        checkpoint = repeated(folder, shape, num_layers)
        skeleton = hf.build(checkpoint, "bfloat16")
        room = room_for(policy)
        engine = build(skeleton.model, checkpoint, skeleton.recipes, policy, room=room)
        model: Any = _attach(skeleton.model, engine)
        try:
            yield model
        finally:
            penstock.unwrap(model)


def score(part: Part, model: Any, shape: Shape, num: int) -> dict[str, Any]:
    """Scores `num` micro-batches in one sweep, twice; the second time is measured."""
    scorer = CausalScorer(model, max_logits_bytes=LOGITS_BYTES)
    batches = [ids.to(part.device) for ids in token_ids(shape, num)]
    layers = model.config.num_hidden_layers

    def act() -> list[Any]:
        with penstock.sweep(model, width=num) as sweep:
            return sweep.map(lambda ids: scorer.log_probabilities(ids, None), batches)

    act()
    part.synchronize()
    before, start = penstock.statistics(model), time.perf_counter()
    act()
    part.synchronize()
    seconds = time.perf_counter() - start
    after = penstock.statistics(model)
    tokens = num * shape.micro_batch_tokens
    parameters = layers * shape.layer_parameters + shape.hidden * shape.vocabulary
    moved = {
        tier: nbytes - before.bytes_read.get(tier, 0)
        for tier, nbytes in after.bytes_read.items()
    }
    return {
        "tokens_in_flight": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "flops_per_second": 2.0 * parameters * tokens / seconds,
        "passes": after.passes - before.passes,
        "bytes_moved": moved,
        "wait_seconds": after.wait_seconds - before.wait_seconds,
    }


def main() -> None:
    part = Part("api", __doc__)
    shape, layers = shape_and_layers(part.is_dry)
    flops = block_flops(part, shape)
    part.put(
        level="penstock's build, sweep and scorer; one stored block, named many times",
        num_layers=layers,
        matmul_flops_per_second=flops,
        targets={"of_matmul_rate": 0.60},
    )
    start = time.perf_counter()
    with streamed(part, shape, layers) as model:
        statistics = penstock.statistics(model)
        part.put(
            load_seconds=time.perf_counter() - start,
            weights_bytes=statistics.model_bytes,
            bytes_by_tier=dict(statistics.bytes_by_tier),
            fallbacks=list(statistics.fallbacks),
        )
        for num in IN_FLIGHT:
            found = part.attempt(
                f"in_flight_{num}", partial(score, part, model, shape, num)
            )
            if found is not None:
                share = found["flops_per_second"] / flops
                part.put(**{f"in_flight_{num}": {**found, "of_matmul_rate": share}})
        if part.has_cuda:
            part.put(peak_device_bytes=torch.cuda.max_memory_allocated())
        part.put(faults=dict(penstock.statistics(model).faults))


if __name__ == "__main__":
    main()
