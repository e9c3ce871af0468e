"""The command `penstock convert`."""

import signal
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...io.errors import StoppedError
from .options import say


class FormatName(StrEnum):
    """What weights can be converted to."""

    int4 = "int4"
    int8 = "int8"
    fp8 = "fp8"
    lossless = "lossless"


def convert(
    model: Annotated[
        Path,
        typer.Argument(
            help="Folder of an unquantised Hugging Face checkpoint: config.json and "
            "*.safetensors. It is only read."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            help="Folder that gets the converted checkpoint. Killed and run again, the "
            "command goes on there, file by file."
        ),
    ],
    to: Annotated[
        FormatName,
        typer.Option(
            help="**int4** (a quarter of the bytes of bfloat16; a scale for each group "
            "of columns), **int8** and **fp8** (half; a scale for each row), or "
            "**lossless** (three quarters, and the very same bits)."
        ),
    ],
    group: Annotated[
        int,
        typer.Option(
            help="Columns that share a scale, of int4: fewer are more exact, and take "
            "more bytes (128: 26 %, 32: 28 %). Layers whose columns are no multiple of "
            "it stay as they are."
        ),
    ] = 128,
    ignore: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Layers whose name contains this stay as they are. By default "
            "lm_head; of lossless none.",
        ),
    ] = None,
) -> None:
    """Writes a copy of a model whose weights take fewer bytes.

    A pass over weights that do not fit costs the bytes that are read: with a quarter
    of them, it takes a quarter of the time where the drive binds.

    int4, int8 and fp8 are written as compressed-tensors has them: transformers, vLLM
    and Penstock (with penstock[quantised]) load them. Linear layers and experts are
    rounded to the nearest number, without calibration data; embeddings, norms, and
    experts that are stored stacked stay as they are. Measure what that does to your
    results: int8 and fp8 change little, int4 more. (On hardware that can, engines round
    activations too, of int8 and fp8. Penstock does not.)

    lossless is Penstock's own format, for weights in bfloat16: results are the same,
    bit for bit, and decoding costs about what a cast to float32 does.

    Needs memory for a few rows of one tensor. No code of the checkpoint runs.

    Example: `penstock convert ./llama-70b ./llama-70b-int4 --to int4`
    """
    from ..convert.conversion import Conversion
    from ..monitoring.show import human_bytes

    if ignore is None:
        ignore = "" if to is FormatName.lossless else "lm_head"
    made = Conversion(model, out, to.value, group=group, ignore=ignore)
    try:
        with _Bar(f"to {to.value}") as bar:
            result = made.run(bar)
    except KeyboardInterrupt:
        raise StoppedError(
            f"stopped: the files that are done are in {out}; run the same command "
            "again to go on",
            signal.SIGINT,
        ) from None
    before, after = result.bytes_before, result.bytes_after
    say(
        f"{'all was there: ' if result.was_there else ''}{result.num_converted} of "
        f"{result.num_tensors} tensors are in {to.value}: {human_bytes(after)}, "
        f"{after / before:.1%} of {human_bytes(before)}"
    )
    print(out)


class _Bar:
    """Shows on a terminal how far a conversion is, and how long the rest takes."""

    def __init__(self, title: str) -> None:
        from ..monitoring.progress import search_bar

        self._bar = search_bar(Console(stderr=True))
        self._task = self._bar.add_task(title, total=None, remark="", left="?")
        self._began = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        from ..monitoring.show import human_seconds

        passed = time.monotonic() - self._began
        self._bar.update(
            self._task,
            completed=done,
            total=total,
            remark=f"{done / 1e9:.1f} of {total / 1e9:.1f} GB",
            left=human_seconds(passed / done * (total - done)) if done else "?",
        )

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
