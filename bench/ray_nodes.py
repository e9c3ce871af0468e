"""Compares two Ray nodes with one, in tokens per second. Each node is bound to a core
of its own, as if it were a machine.

    python bench/ray_nodes.py [--rounds 3] [--rows 512]

A Llama with 8 layers (hidden 1024, float32) scores random texts, streamed from disk.
Ray takes seconds to start actors. So two times are shown: that of the whole job, and
that between the start of the first batch and the end of the last one, which counts.
Scores are compared between all runs. The last line is one JSON object.

Takes about a quarter of an hour; needs Ray and two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from common import frame, models
from penstock import Mapper

sys.path.insert(0, str(frame.BENCH.parent / "tests"))
BATCH_ROWS = 32


class Timed(Mapper):
    """Records when and where each batch was processed."""

    def __call__(self, table: Any) -> Any:
        import ray

        start = time.time()
        found = super().__call__(table)
        extra = {
            "start": start,
            "end": time.time(),
            "node": ray.get_runtime_context().get_node_id(),
        }
        for name, value in extra.items():
            found = found.append_column(name, [[value] * len(found)])
        return found


def make_model(folder: Path) -> None:
    models.square(folder, layers=8, hidden=1024, vocab_size=600)
    models.write_tokenizer(folder, models.SIZES["tiny"])


def run_job(address: str, model: Path, source: Path, output: Path, nodes: int) -> None:
    """Runs the job: the driver, in a process of its own."""
    import ray
    import ray.data

    from ray_cluster import COMPUTES

    ray.init(address=address, log_to_driver=False, _node_ip_address="127.0.0.1")
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    rows = ray.data.read_json(str(source))
    found = rows.repartition(target_num_rows_per_block=BATCH_ROWS).map_batches(
        Timed,
        fn_constructor_kwargs={"model": model, "policy": {"device_memory": "96MiB"}},
        batch_format="pyarrow",
        batch_size=BATCH_ROWS,
        num_cpus=1,
        resources={COMPUTES: 1},
        compute=ray.data.ActorPoolStrategy(size=nodes),
    )
    output.write_text(json.dumps(found.take_all()))
    ray.shutdown()


def measure(model: Path, source: Path, cores: list[int]) -> dict[str, Any]:
    from ray_cluster import ENVIRONMENT, ray_nodes

    output = source.with_suffix(".found")
    begin = time.time()
    with ray_nodes(cores) as address:
        subprocess.run(
            [
                *(sys.executable, __file__, "--job", address, str(model)),
                *(str(source), str(output), str(len(cores))),
            ],
            env={**os.environ, **ENVIRONMENT},
            stderr=subprocess.DEVNULL,
            check=True,
        )
    rows = json.loads(output.read_text())
    span = max(r["end"] for r in rows) - min(r["start"] for r in rows)
    return {
        "nodes": len({row["node"] for row in rows}),
        "seconds": span,
        "seconds_with_start": time.time() - begin,
        "tokens_per_second": sum(row["tokens"] for row in rows) / span,
        "logprobs": [row["logprob"] for row in rows],
    }


def parse_args() -> argparse.Namespace:
    parser = frame.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--job", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.job:
        address, model, rows, output, nodes = args.job
        run_job(address, Path(model), Path(rows), Path(output), int(nodes))
        return 0
    frame.card(frame.BENCH)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("this takes two cores")
    random = Random(0)
    with frame.scratch() as folder:
        make_model(folder / "model")
        source = folder / "rows.jsonl"
        with source.open("w") as file:
            for number in range(args.rows):
                words = [str(random.randrange(1000)) for _ in range(40)]
                file.write(json.dumps({"id": number, "text": " ".join(words)}) + "\n")
        found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
        for number in range(args.rounds):
            for nodes in (1, 2) if number % 2 == 0 else (2, 1):
                run = measure(folder / "model", source, cores[:nodes])
                found[nodes].append(run)
                print(
                    f"{nodes} nodes: {run['tokens_per_second']:.0f} tokens/s, "
                    f"{run['seconds']:.1f} s, from start to end "
                    f"{run['seconds_with_start']:.1f} s",
                    flush=True,
                )
    first = found[1][0]["logprobs"]
    worst = max(
        abs(a - b)
        for runs in found.values()
        for run in runs
        for a, b in zip(run["logprobs"], first, strict=True)
    )
    ratios = [
        two["tokens_per_second"] / one["tokens_per_second"]
        for one, two in zip(found[1], found[2], strict=True)
    ]
    result = {
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
        "largest_difference_of_logprobs": worst,
    }
    return frame.finish(result)


if __name__ == "__main__":
    sys.exit(main())
