"""Makes random jobs on small models with random weights."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import models
from penstock.offload.settings.values import parse_bytes

SHAPES = (  # hidden, intermediate, layers, kv heads, vocabulary
    (768, 2048, 12, 12, 8000),
    (1024, 2816, 10, 4, 16000),
    (1536, 4096, 6, 24, 8000),
    (2048, 5632, 4, 8, 32000),
)
FLOPS_OF_A_RUN = 6e11
"""The approximate work of a run: three to ten seconds on a few cores."""


@dataclass(frozen=True)
class Case:
    """One run: a model, its work, and its policy."""

    shape: int
    generates: bool
    num_rows: int
    length: int
    new_tokens: int
    settings: dict[str, Any]


def cases(num: int, seed: int) -> list[Case]:
    """`num` random cases, always the same ones for a seed. A third of them generate."""
    chosen = random.Random(seed)
    return [_case(chosen, number % 3 == 2) for number in range(num)]


def _case(chosen: random.Random, generates: bool) -> Case:
    shape = chosen.randrange(len(SHAPES))
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device_memory": chosen.choice(_fitting(SHAPES[shape])),
        "lookahead": chosen.choice((1, 2, 3)),
        "gather_rows": chosen.choice(("1MiB", "1GiB")),
    }
    way = chosen.choice(("disk", "disk", "host", "slow disk", "slow host"))
    if "host" in way:
        settings["host_memory"] = chosen.choice(("64MiB", "128MiB", "256MiB"))
    if way.startswith("slow"):
        speed = chosen.choice(("100MB", "200MB", "400MB"))
        settings["links"] = {way.removeprefix("slow "): {"bandwidth": speed}}
    most_tokens = FLOPS_OF_A_RUN / flops_of_token(SHAPES[shape])
    if not generates:
        length = chosen.choice((32, 64, 128, 256))
        each = max(length, chosen.choice((64, 128, 256, 512)))
        settings["micro_batch_tokens"] = each
        settings["tokens_in_flight"] = each * chosen.choice((1, 2, 4))
        passes = round(most_tokens / settings["tokens_in_flight"])
        passes = min(max(passes, 2), 12)
        num_rows = settings["tokens_in_flight"] // length * passes
        return Case(shape, False, num_rows, length, 0, settings)
    settings["micro_batch_sequences"] = chosen.choice((4, 8, 16))
    settings["sequences_in_flight"] = 16 * chosen.choice((1, 2, 4))
    if chosen.random() < 0.5:
        settings["kv"] = {"tier": "host"}
    num_rows, length = settings["sequences_in_flight"], chosen.choice((16, 32, 64))
    # Matrix products of few rows have about a third of the rate of those of many.
    new = round((most_tokens / num_rows - length) / 3)
    return Case(shape, True, num_rows, length, min(max(new, 6), 24), settings)


def _fitting(shape: tuple[int, ...]) -> list[str]:
    """Sizes of the working set in which the largest unit fits: the head, in float32."""
    hidden, *_, vocabulary = shape
    least = 4 * hidden * vocabulary + (1 << 20)
    sizes = ("192MiB", "256MiB", "512MiB")
    return [size for size in sizes if parse_bytes(size) >= least]


def flops_of_token(shape: tuple[int, ...]) -> float:
    """The approximate FLOPs of one token, in the blocks' matrix products."""
    hidden, intermediate, layers, *_ = shape
    return 2.0 * layers * hidden * (3 * hidden + 3 * intermediate)


def make_model(folder: Path, shape: tuple[int, ...], *, shrink: int) -> Path:
    """Makes a Llama with random weights in bfloat16, `shrink` times narrower, and
    returns its folder."""
    hidden, intermediate, layers, kv_heads, vocabulary = shape
    if folder.exists():
        return folder
    return models.llama(
        folder,
        dtype=torch.bfloat16,
        hidden_size=hidden // shrink,
        intermediate_size=intermediate // shrink,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary // shrink,
        eos_token_id=None,
        bos_token_id=None,
    )
