"""Score with transformers and accelerate: `from_pretrained` puts on the CPU what fits
`max_memory` and leaves the rest on disk, from where accelerate's hooks load each
module just before it runs and drop it just after."""

from __future__ import annotations

from typing import Any

from peer_common import Meter, offload_folder, parse_options, score, versions


def main() -> None:
    options = parse_options(__doc__, "accelerate")
    meter = Meter("accelerate")
    import torch
    from transformers import AutoModelForCausalLM

    with offload_folder(options) as folder:
        meter.start_loading()
        # Weights that the checkpoint holds as the model wants them are not written
        # again: the hooks read them from the checkpoint's own safetensors files.
        model: Any = AutoModelForCausalLM.from_pretrained(
            options.model,
            dtype=getattr(torch, options.dtype),
            device_map="auto",
            max_memory={"cpu": options.cpu_memory},
            offload_folder=folder,
        )
        model.eval()
        meter.finish_loading(model)

        def forward(ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
            return logits

        scores = score(forward, options)
        devices = list(model.hf_device_map.values())
        meter.report(
            options,
            versions("accelerate"),
            scores,
            folder,
            modules_on_cpu=devices.count("cpu"),
            modules_on_disk=devices.count("disk"),
        )


if __name__ == "__main__":
    main()
