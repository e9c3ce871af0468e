"""Makes Llamas of a given shape and memory, and micro-batches for them."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gpu.common import Part
from gpu.links import matmul
from penstock.offload.monitoring.memory import available_bytes

MARGIN_BYTES = 24 << 30
"""Bytes of host memory to leave free."""
WANTED_BYTES = 65_000_000_000
"""Bytes of weights of a whole model: more than what the project promises to stream
(64 GB)."""
FEWER_BYTES = 30_000_000_000
"""Bytes of weights where only rates count, which are those of any number of blocks."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model: blocks of Llama 2 70B (or 3), and a small vocabulary, since
    only the blocks matter."""

    hidden: int = 8192
    intermediate: int = 28672
    heads: int = 64
    kv_heads: int = 8
    vocabulary: int = 32_000
    row_tokens: int = 1024
    rows: int = 4
    """The number of rows of a micro-batch."""

    @property
    def micro_batch_tokens(self) -> int:
        return self.row_tokens * self.rows

    @property
    def layer_parameters(self) -> int:
        """The number of parameters in the matrices of one block."""
        kv = self.hidden * self.kv_heads // self.heads
        return self.hidden * (2 * self.hidden + 2 * kv + 3 * self.intermediate)

    @property
    def layer_bytes(self) -> int:
        return 2 * (self.layer_parameters + 2 * self.hidden)

    def config(self, num_layers: int) -> LlamaConfig:
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=num_layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
        )
        config._attn_implementation = "sdpa"  # the default here is slow
        return config


SEVENTY_B = Shape()
EIGHT_B = Shape(hidden=4096, intermediate=14336, heads=32)
TINY = Shape(
    hidden=64, intermediate=176, heads=4, kv_heads=2, vocabulary=600, row_tokens=8
)


def shape_of(is_dry: bool) -> Shape:
    return TINY if is_dry else SEVENTY_B


def shape_and_layers(
    is_dry: bool, wanted_bytes: int = WANTED_BYTES
) -> tuple[Shape, int]:
    """The shape of the model, and the number of blocks that are streamed."""
    shape = shape_of(is_dry)
    return shape, 3 if is_dry else most_layers(shape, wanted_bytes)


def block_flops(part: Part, shape: Shape) -> float:
    """FLOP/s of the widest product of a block, for one micro-batch."""
    return matmul(part, shape.micro_batch_tokens, shape.intermediate, shape.hidden)


def most_layers(shape: Shape, wanted_bytes: int) -> int:
    """The number of blocks that have `wanted_bytes`, or fewer if host memory cannot
    hold them."""
    free = available_bytes() - MARGIN_BYTES
    wanted = -(-wanted_bytes // shape.layer_bytes)
    return max(3, min(wanted, free // shape.layer_bytes))


def token_ids(shape: Shape, num_micro_batches: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(
            5, shape.vocabulary, (shape.rows, shape.row_tokens), generator=generator
        )
        for _ in range(num_micro_batches)
    ]


def position(
    part: Part, shape: Shape, num_layers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary tables of a micro-batch: cos and sin, bfloat16 [1, length, head]."""
    rotary = LlamaRotaryEmbedding(shape.config(num_layers)).to(part.device)
    like = torch.empty(1, dtype=torch.bfloat16, device=part.device)
    ids = torch.arange(shape.row_tokens, device=part.device)[None]
    cos, sin = rotary(like, ids)
    return cos, sin


def first_of(output: Any) -> torch.Tensor:
    """The hidden states that a block returns; older versions of transformers return a
    tuple."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, torch.Tensor)
    return found


def fill(target: torch.Tensor, scale: float, device: torch.device) -> None:
    """Fills `target`, uint8 in host memory, with random bfloat16 numbers."""
    step = 1 << 28
    flat = target.view(torch.bfloat16)
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        made = torch.randn(len(part), dtype=torch.bfloat16, device=device) * scale
        part.copy_(made)
