"""Embeds a corpus, and finds the texts that are nearest to a query.

    python examples/embed_corpus.py MODEL examples/texts.jsonl vectors.npz \\
        --query "a voyage at sea"

Takes encoders (the pooling of sentence-transformers' files is used where there are any)
and decoders. The output has `ids` (str, one for each row) and `vectors` (float32, rows
by width, of length 1). They are kept in memory until the end: for more rows than fit
there, `penstock embed MODEL texts.jsonl -o vectors.parquet` writes them as they come.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: see docs/limits.md

import numpy as np
import numpy.typing as npt

from penstock import PenstockError, Policy, embed, load


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("texts", type=Path, help="JSON lines: id and text")
    parser.add_argument("vectors", type=Path, help="NumPy file to write (.npz)")
    parser.add_argument("--query", help="print the texts that are nearest to this one")
    parser.add_argument("--set", nargs="*", default=[], help="of the policy: key=value")
    return parser.parse_args()


def embedded(
    model: Any, rows: Iterable[Mapping[str, Any]]
) -> tuple[list[str], npt.NDArray[np.float32]]:
    """The ids and the vectors of all rows but those that fail, which are named."""
    ids, vectors = [], []
    for result in embed(model, rows, normalize=True, truncate=512):
        if "error" in result:
            print(f"{result['id']}: {result['error']}", file=sys.stderr)
        else:
            ids.append(str(result["id"]))
            vectors.append(np.asarray(result["embedding"], np.float32))
    return ids, np.stack(vectors) if vectors else np.empty((0, 0), np.float32)


def main() -> None:
    args = parse_args()
    with args.texts.open(encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if "text" in row]
    with load(args.model, Policy().with_settings(args.set)) as model:
        ids, vectors = embedded(model, rows)
        np.savez(args.vectors, ids=np.array(ids, np.str_), vectors=vectors)
        print(f"{args.vectors}: {len(ids)} vectors of {vectors.shape[1]} numbers")
        if args.query is not None and ids:
            _, query = embedded(model, [{"id": "query", "text": args.query}])
            likeness = vectors @ query[0]  # cosines: all vectors have length 1
            for place in np.argsort(-likeness)[:3]:
                print(f"{likeness[place]:.3f}  {ids[place]}")


if __name__ == "__main__":
    try:
        main()
    except (PenstockError, OSError) as error:
        sys.exit(str(error))
