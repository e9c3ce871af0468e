"""Completes a JSON lines file of chats with a model that need not fit into memory.

    python examples/complete_chats.py MODEL examples/chats.jsonl answers.jsonl

A row is {"id", "messages"}, as chat APIs take it, and may have its own "max_tokens",
"temperature", "stop" and others. All rows in flight share each pass over the weights,
and when some have ended the next ones take their places.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: see docs/limits.md

from penstock import PenstockError, Policy, generate, load


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("chats", type=Path, help="JSON lines with messages")
    parser.add_argument("answers", type=Path, help="JSON lines to write")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, help="default: as the model says")
    parser.add_argument("--set", nargs="*", default=[], help="of the policy: key=value")
    return parser.parse_args()


def chats_in(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def main() -> None:
    args = parse_args()
    options: dict[str, Any] = {}
    if args.temperature is not None:
        options = {"do_sample": True, "temperature": args.temperature}
    with (
        load(args.model, Policy().with_settings(args.set)) as model,
        args.answers.open("w", encoding="utf-8") as answers,
    ):
        num_failed = 0
        for answer in generate(
            model, chats_in(args.chats), max_new_tokens=args.max_new_tokens, **options
        ):
            num_failed += "error" in answer
            answers.write(json.dumps(answer) + "\n")
            answers.flush()  # whoever waits for the file sees each answer at once
    print(f"answers: {args.answers} ({num_failed} rows with errors)")


if __name__ == "__main__":
    try:
        main()
    except (PenstockError, OSError) as error:
        sys.exit(str(error))
