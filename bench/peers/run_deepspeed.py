"""Score with DeepSpeed ZeRO-Inference on its CPU accelerator: ZeRO stage 3 in one
process, every parameter of a megabyte or more kept in a file of its own, read back by
the async_io op just before its module runs.

The configuration follows `zero_inference` in DeepSpeed's examples, but for buffers
fitted to the model (theirs are 2 GiB each) and more reads at once, which is faster."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

from peer_common import Meter, offload_folder, parse_options, score, versions

# The example's number of swap buffers, one for each parameter read ahead or in use.
# More of them made no run faster, and each is as large as the largest parameter.
BUFFERS = 5


def set_environment() -> None:
    """One process without a launcher, on the CPU. Before DeepSpeed is imported."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        GLOO_SOCKET_IFNAME="lo",
        MASTER_PORT=str(port),
        # The compiled ops live in the environment, where make_envs.py built them.
        TORCH_EXTENSIONS_DIR=str(Path(sys.prefix, "torch_extensions")),
    )
    # ninja is the environment's own, which is not on the path unless activated.
    os.environ["PATH"] = f"{Path(sys.prefix, 'bin')}:{os.environ.get('PATH', '')}"


def build_ops() -> None:
    """Compile what a run needs (make_envs.py calls this: it takes minutes)."""
    set_environment()
    import deepspeed
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=True):
        raise SystemExit(
            "DeepSpeed's async_io needs a C++ compiler and libaio's headers: "
            "on Debian, apt-get install g++ libaio-dev"
        )
    deepspeed.init_distributed("gloo")  # compiles the shared-memory op
    builder.load()


def configuration(model: Path, dtype: str, folder: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    auto_model: Any = AutoModelForCausalLM
    config = AutoConfig.from_pretrained(model)
    hidden = config.get_text_config().hidden_size
    with torch.device("meta"):
        sizes = [p.numel() for p in auto_model.from_config(config).parameters()]
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 2 * hidden * hidden,
            "stage3_param_persistence_threshold": hidden,
            "stage3_max_live_parameters": 2 * hidden * hidden,
            "offload_param": {
                "device": "nvme",
                "nvme_path": str(folder),
                "pin_memory": False,
                "buffer_count": BUFFERS,
                "buffer_size": max(sizes),
            },
        },
        "aio": {
            "block_size": 1 << 20,
            "queue_depth": 32,
            "intra_op_parallelism": 4,
            "single_submit": False,
            "overlap_events": True,
        },
    }


def main() -> None:
    options = parse_options(__doc__, "deepspeed")
    meter = Meter("deepspeed")
    set_environment()
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM, integrations

    hugging_face: Any = integrations
    with offload_folder(options) as folder:
        meter.start_loading()
        # It keeps all large weights on disk or none: --cpu-memory has no place here.
        config = configuration(options.model, options.dtype, folder)
        deepspeed.init_distributed("gloo")
        dtype = getattr(torch, options.dtype)
        # While this object lives, from_pretrained builds the model under zero.Init:
        # each parameter goes to its file as soon as it is made.
        zero3 = hugging_face.HfDeepSpeedConfig(config)
        model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        engine = deepspeed.initialize(model=model.eval(), config=config)[0]
        engine.module.eval()
        meter.finish_loading(engine.module)

        def forward(ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = engine(input_ids=ids, use_cache=False).logits
            return logits

        scores = score(forward, options)
        elements = config["zero_optimization"]["offload_param"]["buffer_size"]
        meter.report(
            options,
            versions("deepspeed"),
            scores,
            folder,
            swap_buffer_bytes=BUFFERS * elements * dtype.itemsize,
        )
        del zero3
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
