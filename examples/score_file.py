"""Scores a JSON lines file of texts with a model that need not fit into memory.

    python examples/score_file.py MODEL examples/texts.jsonl scores.jsonl

A row is {"id", "text"} or {"id", "prompt", "completion"}; its result has the
log-probability of the text (or of the completion) in nats. `penstock score` does the
same and can be killed and run again; take this as the start of a program of your own.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: see docs/limits.md

from penstock import PenstockError, Policy, load, score, statistics


def main(model_folder: str, rows_file: str, scores_file: str, *settings: str) -> None:
    policy = Policy().with_settings(settings)  # such as device_memory=2GiB
    with (
        load(model_folder, policy) as model,
        open(rows_file, encoding="utf-8") as rows,
        open(scores_file, "w", encoding="utf-8") as scores,
    ):
        # Rows are read as they are needed: the file may be larger than memory.
        for result in score(model, (json.loads(row) for row in rows)):
            scores.write(json.dumps(result) + "\n")
        counts = statistics(model)
    print(
        f"{counts.passes} passes over {counts.model_bytes / 2**20:,.1f} MiB of "
        f"weights, at most {counts.peak_device_bytes / 2**20:,.1f} MiB in memory"
    )


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(f"usage: {Path(sys.argv[0]).name} MODEL ROWS SCORES [key=value ...]")
    try:
        main(*sys.argv[1:])
    except (PenstockError, OSError) as error:
        sys.exit(str(error))
