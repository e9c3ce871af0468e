"""Measures how much slower computing is while weights are loaded by the same cores.

It is more than the share of the cores that loading takes. A matrix product is divided
evenly among threads, so it waits for the thread whose core is casting. Both also
compete for caches and memory, and both run Python. So a small checkpoint is scored
twice: with all weights resident, and streamed.
"""

from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from torch import nn

from ..model import engine_of, load
from .measure_calls import Block, jobs_policy, score_seconds
from .rounds import rounds

_BLOCK = Block(hidden=1024, intermediate=2816, heads=16)
_NUM_BLOCKS = 4
_TOKENS, _BATCHES, _PASSES = 64, 4, 3
_PREFIX_BYTES = 16 << 20


def cast_beside(cache: Path) -> float:
    """The seconds that computing loses for each stored byte that is read and cast at
    the same time. Writes a checkpoint into the folder `cache`."""
    folder = cache / "beside"
    block = _save(folder)
    num_rows = _BATCHES * _PASSES
    with ExitStack() as opened:
        there, streamed = (
            opened.enter_context(
                load(
                    folder,
                    jobs_policy(
                        "cpu",
                        cache,
                        dtype="float32",
                        device_memory=room,
                        micro_batch_tokens=_TOKENS,
                        tokens_in_flight=_TOKENS * _BATCHES,
                    ),
                )
            )
            for room in ((_NUM_BLOCKS + 2) * block, 2 * block + _PREFIX_BYTES)
        )
        found = []
        engine = engine_of(streamed)
        assert engine is not None, "`load` gives a streamed model"
        for number in chain([-1], rounds()):
            before = engine.statistics()
            seconds = score_seconds(streamed, num_rows, _TOKENS)
            after = engine.statistics()
            seconds -= after.wait_seconds - before.wait_seconds
            seconds -= score_seconds(there, num_rows, _TOKENS)
            nbytes = after.bytes_loaded - before.bytes_loaded
            if number >= 0:  # the first round touches memory for the first time
                found.append(seconds / nbytes)
    return max(0.0, median(found))


def _save(folder: Path) -> int:
    """Saves a model in bfloat16 to `folder`. Returns the bytes of one block in
    float32."""
    made = _BLOCK.model(_NUM_BLOCKS).to(torch.bfloat16)
    made.config.save_pretrained(folder)
    save_file(made.state_dict(), folder / "model.safetensors")
    block: nn.Module = made.model.layers[0]
    return 4 * sum(p.numel() for p in block.parameters())
