"""Measures what quantising costs in perplexity, on a model that has learnt something.

    python bench/quality.py [--steps 1000] [--models DIR] [--out DIR]

Trains a small Llama on the documentation in Python's modules that are on this machine
(nothing is downloaded; always the same for a seed), and holds some files' text out. The
model is quantised in each way, and `penstock verify --against` scores the text that was
held out with both. The ceiling is the original itself: no difference. Each difference
stands beside its goal. The baselines say that it is a model: what guessing evenly, and
by the frequency of tokens, would give. The last line is one JSON object.

Takes about six minutes on two cores, five of them to train; needs 1 GB of memory, and
for int8 and int4 compressed-tensors.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from common import frame
from common.machine_text import documentation
from common.trained import Training, trained, write_rows

GOALS = {"lossless": 0.0, "int8": 0.005, "fp8": 0.01, "int4": 0.05}
"""The most that perplexity may rise, as a share."""
COMMAND = (sys.executable, "-c", "from penstock.offload.cli import main; main()")
BLOCK = 128
_FP8_MOST = 448.0  # the largest number in float8_e4m3fn
_ROW_LETTERS = 250
_MODEL = "model.safetensors"


def penstock(*arguments: str | Path) -> None:
    """Runs the command line. Raises SystemExit with what it says where it fails."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True)
    if done.returncode:
        said = (done.stdout + done.stderr).decode()
        raise SystemExit(f"penstock {arguments[0]}: {said}")


def by_command() -> set[str]:
    """The ways that `penstock convert` has, and whose results can be loaded here."""
    done = subprocess.run([*COMMAND, "convert", "--help"], capture_output=True)
    if done.returncode:
        return set()
    has_library = importlib.util.find_spec("compressed_tensors") is not None
    return set(GOALS) if has_library else {"lossless"}


def quantised(source: Path, folder: Path, way: str, *, is_command: bool) -> Path:
    """The checkpoint `source` in another format, in `folder`: by the command, or in FP8
    also by this script. Returns the folder."""
    if is_command:
        group = ("--group", f"{BLOCK}") if way == "int4" else ()
        penstock("convert", source, folder, "--to", way, *group)
        return folder
    assert way == "fp8", "the other formats need the command"
    shutil.copytree(source, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / _MODEL).items():
        if weight.ndim == 2 and "embed" not in name and "lm_head" not in name:
            numbers, scales = fp8_blocks(weight)
            tensors |= {name: numbers, f"{name}_scale_inv": scales}
        else:
            tensors[name] = weight
    save_file(tensors, folder / _MODEL, {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [rows, columns] as float8_e4m3fn, and the float32 scales of its blocks
    of 128 x 128."""
    rows, columns = weight.shape
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = torch.zeros(down * BLOCK, across * BLOCK)
    padded[:rows, :columns] = weight.float()
    blocks = padded.view(down, BLOCK, across, BLOCK)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / _FP8_MOST
    numbers = (blocks / scales[:, None, :, None]).view_as(padded)[:rows, :columns]
    return numbers.to(torch.float8_e4m3fn).contiguous(), scales


def guesses(folder: Path, training: Sequence[str], rows: Sequence[str]) -> float:
    """The perplexity of `rows` where each token is guessed by its frequency in the
    texts of training."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(texts: Sequence[str]) -> list[int]:
        encoded = tokenizer(list(texts), verbose=False)["input_ids"]
        return [token for ids in encoded for token in ids[1:]]

    counts = Counter(tokens(training))
    total = sum(counts.values()) + len(tokenizer)
    held_out = tokens(rows)
    logs = [math.log((counts[token] + 1) / total) for token in held_out]
    return math.exp(-math.fsum(logs) / len(logs))


def compared(model: Path, original: Path, rows: Path, out: Path) -> dict[str, Any]:
    """The figures of `penstock verify MODEL --against ORIGINAL ROWS`."""
    penstock("verify", model, "--against", original, rows, "-o", out)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def result_of(
    way: str, found: Mapping[str, Any], *, is_command: bool
) -> dict[str, Any]:
    """What is kept of a comparison."""
    texts, weights = found["texts"], found["weights"]
    return {
        "way": way,
        "perplexity": texts["perplexity"],
        "perplexity_difference": texts["perplexity_difference"],
        "standard_error": texts["perplexity_difference_standard_error"],
        "goal": GOALS[way],
        "is_good": texts["perplexity_difference"] <= GOALS[way],
        "format": "penstock convert" if is_command else "this script",
        "is_identical": texts["is_identical"],
        "top1_agreement": texts["top1_agreement"],
        "weights_relative_error": weights["relative_error"],
        "stored_bytes": weights["stored_bytes"],
        "original_stored_bytes": weights["original_stored_bytes"],
    }


def show(result: Mapping[str, Any]) -> None:
    stored = result["stored_bytes"] / result["original_stored_bytes"]
    print(
        f"{result['way']:9} perplexity {result['perplexity']:8.4f} "
        f"{100 * result['perplexity_difference']:+8.4f} % "
        f"(standard error {100 * (result['standard_error'] or 0):.4f} %, goal at most "
        f"+{100 * result['goal']:.1f} %), top-1 {100 * result['top1_agreement']:.2f} %,"
        f" weights off by {100 * (result['weights_relative_error'] or 0):.3f} %, "
        f"{stored:.2f} of the bytes",
        flush=True,
    )


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = frame.parser(__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--letters", type=int, default=3_000_000, help="of text")
    parser.add_argument("--rows", type=int, default=400, help="to score, held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--models", type=Path, help="folder to keep the models in")
    parser.add_argument("--out", type=Path, help="folder for quality.json")
    return parser.parse_args(arguments)


def run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Trains, quantises and compares, with all models in `folder`."""
    training, held_out = documentation(args.letters)
    texts = [text[:_ROW_LETTERS] for text in held_out][: args.rows]
    rows = write_rows(folder / "held_out.jsonl", texts)
    original = folder / "original"
    made = folder / "original.json"
    if not made.exists():
        names = ("hidden", "layers", "vocabulary", "steps", "batch", "length", "seed")
        asked = Training(**{name: getattr(args, name) for name in names})
        frame.write(made, json.dumps(trained(original, asked, training)))
    found: dict[str, Any] = json.loads(made.read_text())
    by_frequency = guesses(original, training, texts)
    commands = by_command()
    ways = [way for way in args.ways if way in {*commands, "fp8"}]
    if skipped := [way for way in args.ways if way not in ways]:
        print(
            f"no {', '.join(skipped)}: needs penstock convert and penstock[quantised]"
        )
    results: list[dict[str, Any]] = []
    for way in ways:
        shutil.rmtree(folder / way, ignore_errors=True)
        model = quantised(original, folder / way, way, is_command=way in commands)
        figures = compared(model, original, rows, folder / f"{way}.json")
        if not results:
            texts_found = figures["texts"]
            found |= {
                "held_out_rows": texts_found["rows"],
                "held_out_tokens": texts_found["tokens"],
                "perplexity": texts_found["original_perplexity"],
                "perplexity_by_frequency": by_frequency,
                "perplexity_evenly": float(args.vocabulary),
                "dtype": texts_found["dtype"],
            }
            print(
                f"{found['parameters'] / 1e6:.1f}M parameters, trained on "
                f"{found['trained_tokens']:,} tokens in "
                f"{found['training_seconds']:.0f} s; perplexity of "
                f"{found['held_out_tokens']:,} tokens held out: "
                f"{found['perplexity']:.4f} (by frequency {by_frequency:.1f}, evenly "
                f"{args.vocabulary})"
            )
        results.append(result_of(way, figures, is_command=way in commands))
        show(results[-1])
    return {**found, "skipped": skipped, "results": results}


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    with frame.scratch(kept=args.models) as folder:
        card = frame.card(folder)
        found = {"machine": card, "settings": frame.settings(args), **run(folder, args)}
    is_good = all(result["is_good"] for result in found["results"])
    out = args.out and args.out / "quality.json"
    return frame.finish(found, out=out, is_good=is_good)


if __name__ == "__main__":
    sys.exit(main())
