"""The command line `penstock`: a command for each task, and those around them."""

import contextlib
import io
import logging
import os
import platform
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from ..io.errors import PenstockError, StoppedError, readable
from ..io.user_errors import user_errors
from .commands import plan, tune, verify
from .commands.convert import convert
from .commands.job_command import job_command
from .commands.options import say
from .commands.policy import policy
from .startup import hidden
from .tasks.registry import TASKS

app = typer.Typer(
    name="penstock",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Runs transformers that do not fit into memory: weights are streamed from the
checkpoint's own files while many micro-batches run through each layer that is there.

Exit codes: **0** all rows done, **1** rows with errors, **2** bad usage or bad input
file, **3** the machine cannot do it (and what would), **130** and **143** stopped by
Ctrl-C or SIGTERM (run it again to go on).""",
)


def _print_versions(is_asked: bool) -> None:
    if is_asked:
        libraries = (f"{name} {version(name)}" for name in ("torch", "transformers"))
        python = f"Python {platform.python_version()}"
        own = import_module(__name__.partition(".")[0]).__version__
        print(f"penstock {own} ({', '.join((*libraries, python))})")
        raise typer.Exit


@app.callback()
def _callback(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_print_versions,
            help="Print the versions of Penstock and of what it runs on, and exit.",
        ),
    ] = False,
) -> None:
    """Sets environment variables that torch and transformers read when they are
    imported."""
    # OpenMP threads that spin between two matrix products take the cores from threads
    # that read and cast the next weights: 8 to 17 % of a short pass, on two cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


for _task in TASKS.values():
    app.command()(job_command(_task))
plan.add_to(app)
tune.add_to(app)
verify.add_to(app)
app.command()(convert)
app.command()(policy)


class _Readable(logging.Formatter):
    """Formats messages without characters that control a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return readable(record.getMessage())


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Prints log messages (fallbacks, faults) on standard error as they come."""
    handler = RichHandler(
        console=Console(stderr=True), show_time=False, show_path=False
    )
    handler.setFormatter(_Readable())
    logger = logging.getLogger("penstock")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


@contextlib.contextmanager
def _nothing_to_ask() -> Iterator[None]:
    """Gives Python's `sys.stdin` no input. Rows from standard input are read without
    it; a library that asked a question there would take a row for the answer."""
    asked, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = asked


def main() -> None:
    """The entry point. A user's mistake is one sentence, never a traceback."""
    try:
        with _log_on_stderr(), _nothing_to_ask(), hidden(), user_errors():
            app()
    except StoppedError as error:
        say(f"{error}")
        sys.exit(error.exit_code)
    except PenstockError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
