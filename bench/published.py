"""Compares published figures of others with what the cost model predicts for their
machines.

    python bench/published.py

These are rows of arXiv 2211.05102 (tables 1 to 3: several chips; four shares are fitted
to tables 2 and 3), ZeRO-Inference from NVMe (only the drive's rate and the model's
shape are used), and CPU rows of ZeRO-Inference and FlexGen with the ceiling that their
links set. The last line is a JSON array.

Takes a second; needs nothing: all figures are in this file.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

from common import frame
from penstock.scheduler.cost.partitioning import (
    Blocks,
    Chips,
    max_context,
    pass_seconds,
)

TPU = {
    "flops": 275e12,
    "memory_bytes": 32 * 2**30,
    "memory_bandwidth": 1.2e12,
    "network_bandwidth": 270e9,
}
# 48 heads are padded to 64, which adds 18B parameters.
PALM_540B = Blocks(558e9, 118, 18432, 73728, kv_heads=1, head_size=256)
PALM_62B = Blocks(62e9, 64, 8192, 32768, kv_heads=1, head_size=256)
MULTIHEAD_540B = Blocks(558e9, 118, 18432, 73728, kv_heads=64, head_size=128)
GB = 1e9


@dataclass(frozen=True)
class Row:
    """One published figure."""

    source: str
    what: str
    unit: str
    published: float
    predicted: float
    is_ceiling: bool = False
    """Whether the prediction is a ceiling that the link sets."""

    @property
    def ratio(self) -> float:
        """Predicted divided by published; for a ceiling, published divided by
        predicted."""
        if self.is_ceiling:
            return self.published / self.predicted
        return self.predicted / self.published


def chips(num: int) -> Chips:
    return Chips(num, **TPU)


def palm_contexts() -> list[Row]:
    """Table 1: 64 chips, 30 % of the memory for keys and values."""
    cases = (
        ("multihead", MULTIHEAD_540B, False, (1320, 330)),
        ("multiquery, by heads", PALM_540B, False, (660, 165)),
        ("multiquery, by batch", PALM_540B, True, (43000, 10700)),
    )
    return [
        Row(
            "PaLM inference, table 1",
            f"{name}, batch {batch}",
            "tokens of context",
            published,
            max_context(blocks, chips(64), batch, by_batch=by_batch),
        )
        for name, blocks, by_batch, figures in cases
        for batch, published in zip((128, 512), figures, strict=True)
    ]


def palm_latencies() -> list[Row]:
    """Tables 2 and 3: prompts of 2,048 tokens, 64 new ones."""
    # (model, chips, prompts at a time, decoded at a time, bytes of a weight, seconds)
    prefills = (
        ("540B", PALM_540B, 64, 1, 2, 0.29),
        ("540B", PALM_540B, 64, 512, 2, 85.2),
        ("62B", PALM_62B, 16, 1, 2, 0.16),
        ("62B", PALM_62B, 32, 512, 2, 20.2),
    )
    decodes = (
        ("540B int8", PALM_540B, 64, 64, 1, 1.82),
        ("540B", PALM_540B, 64, 512, 2, 6.0),
        ("62B int8", PALM_62B, 16, 32, 1, 0.73),
        ("62B", PALM_62B, 8, 512, 2, 5.1),
    )
    source = "PaLM inference, tables 2 and 3"
    return [
        Row(
            source,
            f"{name}, {num} chips, prefill, batch {batch}",
            "s",
            seconds,
            pass_seconds(batch * 2048, blocks, chips(num), weight_itemsize=size),
        )
        for name, blocks, num, batch, size, seconds in prefills
    ] + [
        Row(
            source,
            f"{name}, {num} chips, 64 tokens, batch {batch}",
            "s",
            seconds,
            64
            * pass_seconds(
                batch, blocks, chips(num), weight_itemsize=size, context=2048
            ),
        )
        for name, blocks, num, batch, size, seconds in decodes
    ]


def streamed_rate(
    weight_bytes: float,
    link: float,
    batch: int,
    prompt: int,
    new: int,
    *,
    parameters: float,
    flops: float,
    counts_prompt: bool = True,
) -> float:
    """Output tokens per second if each of `new` passes reads all weights over `link`,
    and the first one also computes the prompts."""
    load = weight_bytes / link
    prefill = max(load, 2.0 * parameters * batch * prompt / flops)
    decode = max(load, 2.0 * parameters * batch / flops)
    seconds = (prefill if counts_prompt else decode) + (new - 1) * decode
    return batch * new / seconds


def zero_nvme() -> list[Row]:
    """DeepNVMe, Llama-3-70B in bfloat16, batch 96, 512 prompt tokens and 32 new."""
    weights, parameters = 141.1 * GB, 70.6e9
    cases = (
        ("A100, 4 PCIe 4 drives", 10 * GB, 312e12, 7.0),
        ("H100, 2 drives", 13 * GB, 989e12, 8.88),
        ("H200, 4 PCIe 5 drives", 27 * GB, 989e12, 17.0),
        ("H200, 8 PCIe 5 drives", 48 * GB, 989e12, 26.0),
    )
    return [
        Row(
            "ZeRO-Inference, NVMe",
            name,
            "output tokens/s",
            published,
            streamed_rate(
                weights, drive, 96, 512, 32, parameters=parameters, flops=flops
            ),
        )
        for name, drive, flops, published in cases
    ]


def cpu_rows() -> list[Row]:
    """Weights in host memory, beside what the link to the GPU allows."""
    # (source, what, parameters, bytes of a weight, link, peak, batch, prompt, new,
    # tokens/s, whether the prompt's time counts)
    v100, a6000, t4 = (12 * GB, 125e12), (25 * GB, 154.8e12), (12 * GB, 65e12)
    zero, blog, flex = (
        "ZeRO-Inference, CPU",
        "ZeRO-Inference, CPU (blog)",
        "FlexGen, CPU",
    )
    half, four = 2.0, 0.5625  # four bits, with a scale for each group of 64
    cases = (
        (blog, "OPT-30B fp16, V100", 30e9, half, v100, 256, 4, 10, 43.0, False),
        (blog, "OPT-175B fp16, V100", 175e9, half, v100, 64, 4, 10, 2.0, False),
        (blog, "BLOOM-176B fp16, V100", 176e9, half, v100, 64, 4, 10, 2.0, False),
        (zero, "OPT-30B int4, A6000", 30e9, four, a6000, 24, 512, 32, 22.74, True),
        (zero, "Llama-2-70B int4, A6000", 70e9, four, a6000, 96, 512, 32, 24.05, True),
        (zero, "Llama-2-70B fp16, A6000", 70e9, half, a6000, 96, 512, 32, 2.91, True),
        (flex, "OPT-30B fp16, T4", 30e9, half, t4, 144, 512, 32, 7.32, True),
        (flex, "OPT-30B int4, T4", 30e9, four, t4, 512, 512, 32, 8.38, True),
        (flex, "OPT-175B int4, T4", 175e9, four, t4, 144, 512, 32, 1.12, True),
    )
    return [
        Row(
            source,
            f"{what}, batch {batch}",
            "output tokens/s",
            published,
            streamed_rate(
                parameters * size,
                link,
                batch,
                prompt,
                new,
                parameters=parameters,
                flops=flops,
                counts_prompt=counts,
            ),
            is_ceiling=True,
        )
        for (
            source, what, parameters, size, (link, flops),
            batch, prompt, new, published, counts,
        ) in cases
    ]  # fmt: skip


def rows() -> list[Row]:
    return [*palm_contexts(), *palm_latencies(), *zero_nvme(), *cpu_rows()]


def main() -> int:
    frame.parser(__doc__).parse_args()
    found = rows()
    for row in found:
        kind = "of the ceiling" if row.is_ceiling else "of the published"
        print(
            f"{row.source:32} {row.what:44} {row.published:9,.4g} {row.unit:18} "
            f"predicted {row.predicted:9,.4g}  {row.ratio:5.2f} {kind}"
        )
    return frame.finish([{**asdict(row), "ratio": row.ratio} for row in found])


if __name__ == "__main__":
    sys.exit(main())
