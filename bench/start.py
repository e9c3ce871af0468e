"""Measures how long a command takes until the first block computes, stage by stage, and
compares it with the least that the libraries themselves take.

Each run is a process of its own, with the checkpoint removed from the page cache.
Penstock and the ceiling take turns. The ceiling imports torch, the model's class and
its tokenizer's class, and nothing else. In addition to seconds, which other work on the
machine increases, the number of imported modules is shown, which does not vary. The
last line of the output is one JSON object.

    python bench/start.py --model CHECKPOINT    # see examples/checkpoint.py
    python bench/start.py --model OUT --config FOLDER

The second one first writes OUT as config.json in FOLDER describes it, with holes for
weights: of any size, they take no room, and reading them costs the kernel what it takes
to clear memory.

Takes about two minutes; needs a checkpoint, or a config, of a Llama-like model.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from common import frame

Stages = dict[str, tuple[float, float]]
"""Wall and CPU seconds of each stage."""
Stage = Callable[[str], AbstractContextManager[None]]


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device-memory", default="auto")
    parser.add_argument("--child", choices=["penstock", "ceiling"])
    args = parser.parse_args()
    if args.child is not None:
        return frame.finish(_child(args.child, args.model, args.device_memory))
    if args.config is not None and not args.model.exists():
        from common import sparse

        num_files, num_tensors, nbytes = sparse.write(args.config, args.model)
        print(f"{num_tensors} tensors in {num_files} files, {nbytes / 1e9:.0f} GB")
    found: dict[str, list[dict[str, Any]]] = {"penstock": [], "ceiling": []}
    for _ in range(args.runs):
        for who, runs in found.items():
            _forget(args.model)
            runs.append(_run(who, args.model, args.device_memory))
    summary = {who: _medians(runs) for who, runs in found.items()}
    for who, stages in summary.items():
        print(f"{who:10}  {'wall':>7}  {'CPU':>7}")
        for stage, (wall, cpu) in stages["stages"].items():
            print(f"  {stage:24}  {wall:6.2f} s {cpu:6.2f} s")
        print(f"  modules: {stages['num_modules']}, peak {stages['peak_mb']:.0f} MB")
    return frame.finish({"runs": args.runs, **summary})


def _run(who: str, model: Path, memory: str) -> dict[str, Any]:
    options = ["--model", str(model), "--child", who, "--device-memory", memory]
    done = subprocess.run(
        [sys.executable, __file__, *options],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    first: Stages = runs[0]["stages"]
    return {
        "num_modules": runs[0]["num_modules"],
        "peak_mb": median(run["peak_mb"] for run in runs),
        "stages": {
            stage: [median(run["stages"][stage][i] for run in runs) for i in (0, 1)]
            for stage in first
        },
    }


def _forget(model: Path) -> None:
    """Removes the weights from the page cache."""
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _child(who: str, model: Path, memory: str) -> dict[str, Any]:
    stages: Stages = {}
    stage = _clock(stages)
    began = time.perf_counter(), time.process_time()
    with stage("import torch"):
        import torch  # noqa: F401
    if who == "ceiling":
        with stage("import transformers"):
            from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401
    else:
        _penstock(model, memory, stage)
    stages["all"] = (
        time.perf_counter() - began[0],
        time.process_time() - began[1],
    )
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"stages": stages, "num_modules": len(sys.modules), "peak_mb": peak_mb}


def _penstock(model: Path, memory: str, stage: Stage) -> None:
    """Runs the steps of `penstock score` up to the first matrix product of the first
    block."""
    from penstock.offload.startup import hidden, rare_collections

    with hidden():
        with stage("import penstock"), rare_collections():
            from penstock import Policy
            from penstock.offload import jobs  # noqa: F401
            from penstock.offload.configs.opening import open_model
            from penstock.offload.engine.build import build
            from penstock.offload.jobs import job  # noqa: F401
            from penstock.offload.rows.text import load_tokenizer
            from penstock.offload.settings.room import room_for
        with stage("import transformers"), rare_collections():
            from penstock.offload.weights import hf
        with stage("headers"), rare_collections():
            checkpoint = open_model(model)
        with stage("skeleton"), rare_collections():
            skeleton = hf.build(checkpoint, "auto")
        policy = Policy(device_memory=memory)
        with stage("tiers, slots, hooks"), rare_collections():
            engine = build(
                skeleton.model,
                checkpoint,
                skeleton.recipes,
                policy,
                room=room_for(policy),
            )
        try:
            ids = [1, 2, 3, 4]
            with stage("tokenizer"):
                if (model / "tokenizer_config.json").exists():
                    ids = load_tokenizer(model)("one row of text")["input_ids"]
            with stage("first block"):
                _first_block(skeleton.model, ids)
        finally:
            engine.close()


class _Reached(Exception):
    """Raised when the first block is loaded and computes."""


def _first_block(model: Any, ids: list[int]) -> None:
    import torch

    def reached(*_: object) -> None:
        raise _Reached

    block = model.model.layers[0].self_attn  # its site is the block
    hook = block.register_forward_pre_hook(reached)
    try:
        model(torch.tensor([ids]))
    except _Reached:
        pass
    finally:
        hook.remove()


def _clock(stages: Stages) -> Stage:
    @contextmanager
    def stage(name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        stages[name] = (time.perf_counter() - wall, time.process_time() - cpu)

    return stage


if __name__ == "__main__":
    sys.exit(main())
