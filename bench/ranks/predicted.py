"""How well are ranks predicted? Fourteen shapes of models over links of limited speed.

    python bench/ranks/predicted.py [--shapes 14] [--rounds 1] [--machine FILE]

Makes small Llamas in `bench/out`. For each shape, two or three processes share one and
score rows, each over a link of its own speed (`links.disk.bandwidth`): ten shapes as a
pipeline, four with rows of their own and weights that they gather. The prediction
is that of `penstock plan --ranks` and of reports, by the machine's file or by quick
estimates. Shows predicted over measured seconds for each shape, the largest time of the
`--rounds` left out, and the bytes that ranks read, which have no noise. The last line
is one JSON object; the exit code is 1 if the median error is above 15 %.

Takes about three minutes a round; needs 0.5 GB of disk in this folder, and two cores
that others leave alone.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does
sys.path.append(str(Path(__file__).resolve().parents[1]))

import penstock
from common import frame, models
from penstock import Policy
from penstock.offload.machines.machine import Machine, find_machine
from penstock.offload.machines.measure_calls import CountingTokenizer
from penstock.offload.model import load_for
from penstock.offload.plans.forecast import scoring_of
from penstock.offload.plans.plan import make_plan
from penstock.offload.plans.planned import Workload
from penstock.offload.plans.ranked import RankGroup, SharedPlanner
from penstock.offload.ranks.joining import RankEnvironment, join
from penstock.offload.tasks.score import score
from penstock.offload.tasks.score_task import Score
from ranks.rank_processes import run_ranks

OUT = Path(__file__).parents[1] / "out"
VOCABULARY = 512
MOST = 0.15


@dataclass(frozen=True)
class Shape:
    """A model, its ranks and their links, and the work that they share."""

    mode: str
    layers: int
    hidden: int
    ranks: int
    rate_mb: int
    """10**6 bytes a second of each rank's link."""
    length: int
    """Tokens of a row; a micro-batch is one row."""
    width: int
    """Micro-batches in flight."""
    passes: int = 4

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, in float32: as `models.square` makes it."""
        return 4 * (4 * self.hidden**2 + 3 * self.hidden * (self.hidden * 11 // 4))

    @property
    def policy(self) -> Policy:
        return Policy(
            ranks=self.mode,
            device_memory=int(3.3 * self.block_bytes) + (3 << 20),
            gather_rows="1KiB",
            micro_batch_tokens=self.length,
            tokens_in_flight=self.length * self.width,
            links={"disk": {"bandwidth": f"{self.rate_mb}MB"}},
            io={"reader": "threads", "cache": OUT / "cache"},
        )

    @property
    def name(self) -> str:
        return (
            f"{self.mode}, {self.layers} x {self.hidden}, {self.ranks} ranks, "
            f"{self.rate_mb} MB/s, {self.width} x {self.length} tokens"
        )

    def make(self) -> Path:
        folder = OUT / f"square-{self.layers}-{self.hidden}"
        if not (folder / "config.json").exists():
            models.square(folder, self.layers, self.hidden, vocab_size=VOCABULARY)
        return folder


SHAPES = (
    Shape("pipeline", 12, 256, 2, 10, 16, 4),
    Shape("pipeline", 16, 384, 2, 40, 16, 8),
    Shape("pipeline", 12, 512, 2, 50, 32, 4),
    Shape("pipeline", 24, 256, 2, 30, 8, 6),
    Shape("pipeline", 18, 384, 3, 25, 16, 6),
    Shape("pipeline", 12, 512, 3, 30, 16, 6),
    Shape("pipeline", 20, 384, 2, 25, 64, 4),
    Shape("pipeline", 12, 512, 2, 25, 48, 8),
    Shape("pipeline", 24, 256, 3, 15, 16, 3),
    Shape("pipeline", 16, 384, 2, 20, 16, 2),
    Shape("gather", 12, 256, 2, 10, 16, 2),
    Shape("gather", 16, 384, 2, 30, 8, 4),
    Shape("gather", 12, 512, 2, 40, 16, 2),
    Shape("gather", 18, 384, 3, 20, 8, 2),
)


def rank(where: RankEnvironment, folder: Path, shape: Shape) -> tuple[float, int]:
    """The seconds of the job on this rank, and the bytes that it read."""
    with load_for("rows", folder, shape.policy, join(where)) as model:
        row = {"id": 0, "text": f"{shape.length}"}
        rows = [row] * (shape.width * shape.passes)
        start = time.perf_counter()
        results = list(score(model, rows, tokenizer=CountingTokenizer(VOCABULARY)))
        seconds = time.perf_counter() - start
        failed = [result for result in results if "error" in result]
        assert not failed, failed[0]
        return seconds, penstock.statistics(model).bytes_read["disk"]


def predicted(folder: Path, shape: Shape, machine: Machine | None) -> float:
    """The predicted seconds of the job."""
    plan = make_plan(
        folder,
        shape.policy,
        machine,
        Workload(Score(), shape.length),
        ranks=RankGroup(shape.ranks),
    )
    planner = plan.planner
    assert isinstance(planner, SharedPlanner), "ranks were planned for"
    policy = planner.policy
    forecast = planner.forecast_for(policy)
    lengths = [shape.length] * (shape.width * shape.passes)
    return planner.predicted(policy, forecast, scoring_of(policy, lengths)).seconds


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--shapes", type=int, default=len(SHAPES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--machine")
    options = parser.parse_args()
    machine = find_machine(options.machine)
    frame.card(OUT.parent)
    print("| shape | predicted | measured | ratio | read by the first |")
    print("|---|---|---|---|---|")
    ratios: dict[str, float] = {}
    for shape in SHAPES[: options.shapes]:
        folder = shape.make()
        times, read = [], 0
        for _ in range(options.rounds):
            found: list[tuple[float, int]] = run_ranks(shape.ranks, rank, folder, shape)
            times.append(found[0][0])
            read = found[0][1]
        seconds = statistics.median(sorted(times)[: max(1, len(times) - 1)])
        guess = predicted(folder, shape, machine)
        ratios[shape.name] = guess / seconds
        print(
            f"| {shape.name} | {guess:.2f} s | {seconds:.2f} s | "
            f"{guess / seconds:.2f} | {read / 1e6:.0f} MB |",
            flush=True,
        )
    errors = [abs(ratio - 1.0) for ratio in ratios.values()]
    result: dict[str, Any] = {
        "predicted_over_measured": ratios,
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
    }
    print(f"median error {result['median_error']:.1%}, worst {max(errors):.1%}")
    return frame.finish(result, is_good=result["median_error"] <= MOST)


if __name__ == "__main__":
    sys.exit(main())
