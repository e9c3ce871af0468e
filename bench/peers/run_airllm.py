"""Score with AirLLM on the CPU: it splits the checkpoint into one file a layer, then
loads each layer just before it runs and drops it just after, one layer at a time."""

from __future__ import annotations

import importlib
from typing import Any

from peer_common import Meter, offload_folder, parse_options, score, versions


def main() -> None:
    options = parse_options(__doc__, "airllm")
    meter = Meter("airllm")
    import torch
    from airllm import AutoModel

    # What AutoModel.from_pretrained would choose for this checkpoint.
    module, name = AutoModel.get_module_class(str(options.model))
    base: Any = getattr(importlib.import_module(module), name)

    class Scorer(base):  # type: ignore[misc]
        def get_tokenizer(self, hf_token: str | None = None) -> None:
            """Scoring token ids needs no tokenizer, and a checkpoint made for a
            benchmark has none; AirLLM would otherwise refuse to load it."""

    with offload_folder(options) as folder:
        meter.start_loading()
        # AirLLM has no memory setting: it holds a layer, whatever --cpu-memory says.
        model = Scorer(
            str(options.model),
            device="cpu",
            dtype=getattr(torch, options.dtype),
            layer_shards_saving_path=str(folder),
        )
        meter.finish_loading(model.model)

        def forward(ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
            return logits

        scores = score(forward, options)
        meter.report(options, versions("airllm", "accelerate"), scores, folder)


if __name__ == "__main__":
    main()
