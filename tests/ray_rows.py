"""Run by test_ray in its own process: scores rows on a Ray cluster of two nodes, with
one worker that dies in the middle."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from penstock import Mapper
from ray_cluster import COMPUTES

NUM_NODES = 2
WAIT_SECONDS = 120.0
POLICY = {"device_memory": "220KiB", "gather_rows": 1000, "resident_below": 10}


class Mortal(Mapper):
    """Dies at its second batch, if nobody has before."""

    def __init__(self, model: str, policy: dict[str, Any], grave: str) -> None:
        super().__init__(model, policy)
        self._grave = Path(grave)
        self._num_batches = 0

    def __call__(self, table: Any) -> Any:
        self._num_batches += 1
        if self._num_batches == 2:
            try:
                self._grave.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os._exit(1)
        node = ray.get_runtime_context().get_node_id()
        found = super().__call__(table)
        self._wait_for_all(node)
        return found.append_column("node", [[node] * len(found)])

    def _wait_for_all(self, node: str) -> None:
        """Until each node has a batch: else one that starts first might take all."""
        folder = self._grave.with_suffix(".nodes")
        folder.mkdir(exist_ok=True)
        (folder / node).touch()
        deadline = time.monotonic() + WAIT_SECONDS
        while len(list(folder.iterdir())) < NUM_NODES:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no batch came to another node than {node}")
            time.sleep(0.05)


def main() -> None:
    address, model, source, output, grave = sys.argv[1:]
    ray.init(address=address, log_to_driver=False, _node_ip_address="127.0.0.1")
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    batches = [rows[at : at + 5] for at in range(0, len(rows), 5)]
    # Blocks from here need no more processes, which would read and divide a file.
    given = ray.data.from_arrow([pa.Table.from_pylist(batch) for batch in batches])
    found = given.map_batches(
        Mortal,
        fn_constructor_kwargs={"model": model, "policy": POLICY, "grave": grave},
        batch_format="pyarrow",
        batch_size=5,
        num_cpus=1,
        resources={COMPUTES: 1},
        compute=ray.data.ActorPoolStrategy(size=NUM_NODES),
    )
    results = found.take_all()
    Path(output).write_text(json.dumps(results))
    ray.shutdown()


if __name__ == "__main__":
    main()
