"""Computes the least time that completions take on a machine with given rates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from penstock.io.checkpoint.index import open_checkpoint

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Rates:
    """Rates that were measured before, after or during runs."""

    wide: float
    """FLOP/s of matrix products with as many rows as prompts have."""
    narrow: float
    """FLOP/s of matrix products with one row for each sequence."""
    disk: float
    """Bytes per second read from the drive."""

    @classmethod
    def mean(cls, samples: Sequence["Rates"]) -> "Rates":
        num = len(samples)
        return cls(
            sum(r.wide for r in samples) / num,
            sum(r.narrow for r in samples) / num,
            sum(r.disk for r in samples) / num,
        )


@dataclass(frozen=True)
class Size:
    """The bytes and parameters of a decoder."""

    block_parameters: float
    head_parameters: float
    """Parameters that only the last token of each sequence is multiplied with."""
    weight_bytes: float
    """Bytes that a pass reads: all but the embedding, whose rows are looked up."""
    kv_bytes_per_token: float

    @classmethod
    def of(cls, model: Path, dtype: torch.dtype) -> "Size":
        """The size of the Llama in the folder `model`; its embedding and head need not
        be tied."""
        checkpoint = open_checkpoint(model)
        embedding, head = (checkpoint.entries[name] for name in (EMBEDDING, HEAD))
        streamed = checkpoint.num_bytes - embedding.nbytes
        head_parameters = head.nbytes / head.dtype.itemsize
        config = AutoConfig.from_pretrained(model)
        width = config.num_key_value_heads * config.head_dim
        kv = 2 * config.num_hidden_layers * width * dtype.itemsize
        blocks = streamed / embedding.dtype.itemsize - head_parameters
        return cls(blocks, head_parameters, streamed, kv)


def ceiling(
    size: Size,
    prompts: Sequence[int],
    new_tokens: int,
    in_flight: int,
    rates: Rates,
    *,
    kv_on_disk: bool,
) -> dict[str, Any]:
    """The least seconds for `prompts` (tokens of each), with `in_flight` sequences in
    every pass.

    It is the sum over all passes of the time for their matrix products, or for reading
    their bytes, whichever is more. With `kv_on_disk`, keys and values also go through
    the drive: new ones are written, earlier ones are read. `seconds_apart` is the
    result if they had a drive of their own.
    """
    rows = len(prompts)
    num_groups = -(-rows // in_flight)
    width = min(in_flight, rows)
    prompt_flops = 2 * size.block_parameters * sum(prompts) / num_groups
    head = 2 * size.head_parameters * width / rates.narrow
    prefill = prompt_flops / rates.wide + head
    step = 2 * size.block_parameters * width / rates.narrow + head
    read = size.weight_bytes / rates.disk
    prompt = sum(prompts) / rows
    kv = width * size.kv_bytes_per_token / rates.disk if kv_on_disk else 0.0
    steps = [max(step, read + kv * (prompt + done)) for done in range(1, new_tokens)]
    first = max(prefill, read + kv * prompt)
    apart = max(prefill, read, kv * prompt) + sum(
        max(step, read, kv * (prompt + done)) for done in range(1, new_tokens)
    )
    return {
        "matmul_flops_per_second": rates.wide,
        "matmul_flops_per_second_of_a_step": rates.narrow,
        "disk_bytes_per_second": rates.disk,
        "read_seconds": read,
        "kv_seconds_of_a_token": kv,
        "prefill_seconds": prefill,
        "step_seconds": step,
        "seconds": num_groups * (first + sum(steps)),
        "seconds_apart": num_groups * apart,
    }
