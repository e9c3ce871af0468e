"""Does the same work in other ways: all weights on the device, accelerate's
`cpu_offload`, and a plain loop that copies each block and then computes.

accelerate gets its weights without a file: those of every block are the same tensors in
host memory, which is pageable, as accelerate leaves it. Each of its forwards moves all
blocks. So it is timed twice: with one micro-batch after the other (from the time of
one), and with all tokens as one batch, which is the best that it can do. The plain loop
has the same memory, and all micro-batches run through a block while it is there.

Takes at most 85 seconds; needs a GPU, accelerate for its part, and 80 GB of the GPU's
memory to have all weights on it.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from gpu.common import Part, lacking
from gpu.shapes import Shape, fill, first_of, position, shape_and_layers, token_ids
from penstock.io.devices.accelerators import memory_of

HEADROOM_BYTES = 14 << 30
"""Bytes of device memory to leave free beside resident weights."""


def num_micro_batches(part: Part) -> int:
    return part.number(8, 2)


def timed(part: Part, act: Callable[[], object], rounds: int) -> float:
    found = []
    for _ in range(part.number(rounds, 1)):
        start = time.perf_counter()
        act()
        part.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def offloaded(part: Part, shape: Shape, num_layers: int) -> Any:
    """The model, offloaded by accelerate's `cpu_offload`."""
    from accelerate import cpu_offload, init_empty_weights

    with init_empty_weights():
        model: Any = LlamaForCausalLM(shape.config(num_layers)).bfloat16()
    state: dict[str, torch.Tensor] = {}
    shared: dict[str, torch.Tensor] = {}
    for name, like in model.state_dict().items():
        head, _, tail = name.partition(".layers.")
        key = tail.partition(".")[2] or head
        if key not in shared:
            shared[key] = torch.ones(like.shape, dtype=torch.bfloat16)
            if like.dim() > 1:
                fill(shared[key].view(-1).view(torch.uint8), 0.02, part.device)
        state[name] = shared[key]
    model.eval()
    return cpu_offload(model, execution_device=part.device, state_dict=state)


def forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(
        input_ids=ids, use_cache=False, logits_to_keep=1
    ).logits
    return logits


def accelerate(part: Part, shape: Shape, num_layers: int) -> dict[str, Any]:
    model = offloaded(part, shape, num_layers)
    batches = [ids.to(part.device) for ids in token_ids(shape, num_micro_batches(part))]
    one = timed(part, lambda: forward(model, batches[0]), rounds=1)
    if part.seconds_left > 3 * one:
        one = min(one, timed(part, lambda: forward(model, batches[1]), rounds=1))
    tokens = num_micro_batches(part) * shape.micro_batch_tokens
    found = {
        "tokens": tokens,
        "seconds_of_one_micro_batch": one,
        "tokens_per_second": shape.micro_batch_tokens / one,
        "bytes_per_second": num_layers * shape.layer_bytes / one,
        "peak_device_bytes": part.peak_bytes(),
    }
    part.put(accelerate=found)
    if part.seconds_left < 3 * one:
        return {**found, "as_one_batch": "skipped: no time left"}
    whole = torch.cat(batches)
    seconds = timed(part, lambda: forward(model, whole), rounds=1)
    return {
        **found,
        "as_one_batch_seconds": seconds,
        "as_one_batch_tokens_per_second": tokens / seconds,
        "as_one_batch_peak_device_bytes": part.peak_bytes(),
    }


def plain(part: Part, shape: Shape, num_layers: int) -> dict[str, Any]:
    """Blocks of pageable memory, copied when it is their turn: no overlap."""
    config = shape.config(num_layers)
    with torch.device("meta"):
        block = LlamaDecoderLayer(config, 0).bfloat16().eval()
    there = block.to_empty(device=part.device)
    stored = [
        torch.empty(weight.shape, dtype=torch.bfloat16) for weight in there.parameters()
    ]
    for weight in stored:
        fill(weight.view(-1).view(torch.uint8), 0.02, part.device)
    rows = (shape.rows, shape.row_tokens, shape.hidden)
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": part.device}
    states = [torch.randn(rows, **kind) for _ in range(num_micro_batches(part))]
    embedded = position(part, shape, num_layers)
    few = min(num_layers, 4)  # all are alike

    def act() -> None:
        found = states
        for _ in range(few):
            for target, source in zip(there.parameters(), stored, strict=True):
                target.copy_(source)
            found = [
                first_of(there(state, position_embeddings=embedded)) for state in found
            ]

    seconds = part.seconds_of(act, rounds=2) * num_layers / few
    tokens = num_micro_batches(part) * shape.micro_batch_tokens
    return {
        "tokens": tokens,
        "seconds": seconds,
        "measured_blocks": few,
        "tokens_per_second": tokens / seconds,
        "peak_device_bytes": part.peak_bytes(),
    }


def resident(part: Part, shape: Shape, num_layers: int) -> dict[str, Any]:
    with torch.device(part.device):
        factory: Any = AutoModelForCausalLM
        model = factory.from_config(shape.config(num_layers), dtype=torch.bfloat16)
    model.eval()
    batches = [ids.to(part.device) for ids in token_ids(shape, num_micro_batches(part))]

    def act() -> None:
        for ids in batches:
            forward(model, ids)

    act()
    part.synchronize()
    seconds = timed(part, act, rounds=2)
    tokens = num_micro_batches(part) * shape.micro_batch_tokens
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "flops_per_second": 2.0
        * num_layers
        * shape.layer_parameters
        * tokens
        / seconds,
        "peak_device_bytes": part.peak_bytes(),
    }


def fits(part: Part, shape: Shape, num_layers: int) -> bool:
    if not part.has_gpu or part.is_dry:
        return True
    free, _ = memory_of(str(part.device))
    tables = 4 * shape.hidden * shape.vocabulary
    return num_layers * shape.layer_bytes + tables + HEADROOM_BYTES <= free


def main() -> None:
    part = Part("rivals", __doc__)
    shape, layers = shape_and_layers(part.is_dry)
    part.put(num_layers=layers, weights_bytes=layers * shape.layer_bytes)
    with torch.no_grad():
        part.give_back()
        if fits(part, shape, layers):
            part.attempt("resident", lambda: resident(part, shape, layers))
        else:
            part.put(resident="skipped: it does not fit")
        part.give_back()
        part.attempt("plain", lambda: plain(part, shape, layers))
        part.give_back()
        if (reason := lacking(("accelerate",))) is not None:
            part.put(accelerate=reason)
        else:
            part.attempt("accelerate", lambda: accelerate(part, shape, layers))


if __name__ == "__main__":
    main()
