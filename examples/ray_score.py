"""Scores a folder of texts on every node of a Ray cluster.

    pip install "penstock[ray]"
    ray start --head                         # on the first machine
    ray start --address=FIRST_MACHINE:6379   # on each other one
    python examples/ray_score.py MODEL "texts/*.jsonl" scores/ --set device_memory=8GiB

Each actor holds one streamed model: one for each node's GPU (`--gpus 1`), or, without
GPUs, one for each so many cores (`--cores`). Ray Data reads, hands out and writes the
rows, and does those of an actor again that died. Outputs are Parquet files with the
input's columns and `logprob`, `tokens`, `perplexity`, `error`, in the input's order.
"""

import argparse
import os
from glob import glob
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import ray.data

from penstock import Mapper, Policy


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, help="checkpoint, at this path on each node"
    )
    parser.add_argument("texts", help="JSONL or Parquet files, as a pattern")
    parser.add_argument("output", type=Path, help="folder for Parquet files")
    parser.add_argument("--actors", type=int, help="default: as many as fit")
    parser.add_argument("--cores", type=float, default=1, help="of each actor")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    parser.add_argument("--rows", type=int, default=256, help="that share passes")
    parser.add_argument("--set", nargs="*", default=[], help="of the policy: key=value")
    parser.add_argument("--address", help="of the cluster (default: the one here)")
    return parser.parse_args()


def fitting_actors(args: argparse.Namespace) -> int:
    """As many as the cluster has room for, beside what reads and writes."""
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    need = {"CPU": args.cores, "GPU": args.gpus}
    have["CPU"] -= 1
    fit = min(int(have.get(kind, 0) / each) for kind, each in need.items() if each)
    return max(1, fit)


def main() -> None:
    args = parse_args()
    policy = Policy().with_settings(args.set)
    ray.init(address=args.address, log_to_driver=False)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    files = sorted(str(Path(name).resolve()) for name in glob(args.texts))
    read = (
        ray.data.read_parquet if args.texts.endswith("parquet") else ray.data.read_json
    )
    rows = read(files)
    actors = args.actors or fitting_actors(args)
    scored = rows.repartition(target_num_rows_per_block=args.rows).map_batches(
        Mapper,
        fn_constructor_kwargs={
            "model": args.model.resolve(),
            "policy": policy.model_dump(mode="json", exclude_unset=True),
        },
        batch_format="pyarrow",
        batch_size=args.rows,
        num_cpus=args.cores,
        num_gpus=args.gpus,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    scored.write_parquet(str(args.output.resolve()))
    print(f"{actors} actors wrote {args.output}")


if __name__ == "__main__":
    main()
