"""Scores texts with one model that several nodes of a Ray cluster share.

    pip install "penstock[ray]"
    ray start --head                         # on the first machine
    ray start --address=FIRST_MACHINE:6379   # on each other one
    python examples/ray_ranks.py MODEL texts.jsonl scores.jsonl --ranks 2 --cores 16

Each actor is a rank: it streams, holds and computes its own blocks of the model (see
docs/ranks.md). An actor sets what torchrun would set; what it runs then is what a
program runs on one machine. For a model that each node can stream fast enough by
itself, examples/ray_score.py is simpler: it shares the texts instead.
"""

import argparse
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray

import penstock
from penstock import Policy


class Rank:
    """One rank of a model, on the node that Ray chooses."""

    def place(self) -> tuple[str, str, int]:
        """The node, its address, and a port that is free there."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        node = ray.get_runtime_context().get_node_id()
        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return node, address, port

    def score(
        self,
        environment: dict[str, str],
        model: str,
        policy: dict[str, Any],
        rows: list[dict[str, Any]],
    ) -> list[dict[str, Any]]:
        """The scores of `rows`, which are the same on all ranks."""
        os.environ.update(environment)
        with penstock.load(model, Policy(**policy), ranks="pipeline") as loaded:
            return list(penstock.score(loaded, rows))


def environments(places: Sequence[tuple[str, str, int]]) -> list[dict[str, str]]:
    """What torchrun would set for ranks at these places. They meet at the first one."""
    nodes = [node for node, _, _ in places]
    _, address, port = places[0]
    return [
        {
            "MASTER_ADDR": address,
            "MASTER_PORT": f"{port}",
            "RANK": f"{rank}",
            "WORLD_SIZE": f"{len(nodes)}",
            "LOCAL_RANK": f"{nodes[:rank].count(node)}",
            "LOCAL_WORLD_SIZE": f"{nodes.count(node)}",
        }
        for rank, node in enumerate(nodes)
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, help="checkpoint, at this path on each node"
    )
    parser.add_argument("texts", type=Path, help="JSON lines")
    parser.add_argument("output", type=Path, help="file for JSON lines")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cores", type=float, default=1, help="of each rank")
    parser.add_argument("--gpus", type=float, default=0, help="of each rank")
    parser.add_argument("--set", nargs="*", default=[], help="of the policy: key=value")
    parser.add_argument("--address", help="of the cluster (default: the one here)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    policy = Policy().with_settings(args.set)
    rows = [json.loads(line) for line in args.texts.read_text().splitlines()]
    ray.init(address=args.address, log_to_driver=False)
    actor: Any = ray.remote(Rank).options(
        num_cpus=args.cores, num_gpus=args.gpus, scheduling_strategy="SPREAD"
    )
    ranks = [actor.remote() for _ in range(args.ranks)]
    places = ray.get([rank.place.remote() for rank in ranks])
    values = policy.model_dump(mode="json", exclude_unset=True)
    model = str(args.model.resolve())
    found = ray.get(
        [
            rank.score.remote(environment, model, values, rows)
            for rank, environment in zip(ranks, environments(places), strict=True)
        ]
    )
    args.output.write_text("".join(f"{json.dumps(row)}\n" for row in found[0]))
    nodes = len({node for node, _, _ in places})
    print(f"{args.ranks} ranks on {nodes} nodes wrote {args.output}")


if __name__ == "__main__":
    main()
