"""Run by test_one_script: a program for one process, or for those of torchrun."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

import penstock
from penstock import Policy


def main() -> None:
    folder, settings = sys.argv[1], sys.argv[2:]
    torch.set_num_threads(1)
    policy = Policy().with_settings(settings)
    given = [torch.tensor([[8 + n, 9, 10 + n]]) for n in range(4)]
    rows = [{"id": n, "text": f"a word or two {n}"} for n in range(5)]

    with penstock.load(folder, policy, ranks="pipeline") as model:

        def complete(ids: torch.Tensor) -> Any:
            return model.generate(ids, max_new_tokens=4, do_sample=False).tolist()

        with penstock.sweep(model) as sweep:
            found = sweep.map(complete, given)
        scores = list(penstock.score(model, rows))
        read = penstock.statistics(model).bytes_read["disk"]
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"tokens": found, "scores": scores, "read": read}))


if __name__ == "__main__":
    main()
