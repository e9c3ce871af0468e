"""The command that compares a model: with itself resident, or with its original."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...io.errors import UsageError, readable
from ..policy import Policy
from .job_command import INTERRUPTED, ROWS_WITH_ERRORS
from .options import (
    SOURCES,
    Model,
    PolicyFile,
    Settings,
    TrustRemoteCode,
    check_alone,
    policy_of,
    say,
)


def add_to(app: typer.Typer) -> None:
    """Adds the command of this file to `app`."""
    app.command()(verify)


def verify(
    model: Model,
    source: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ROWS]...",
            help='With --against: texts to score with both, {"id", "text"} or {"id", '
            '"prompt", "completion"}. Without them only weights are compared. '
            + SOURCES.replace(", or - for standard input", ""),
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="ORIGINAL",
            help="Instead: compares with the checkpoint that MODEL was made from, such "
            "as an unquantised one. Error of the weights of each unit; with ROWS also "
            "perplexities and how often both hold the same next token for most "
            "probable.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.json",
            help="With --against: JSON file for all figures.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            help="With --against: folder for quality.html, a page with a picture of "
            "the error of each unit, and quality.json.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="With --against: score texts longer than the model's context in "
            "windows of so many tokens. Without it such a row is an error."
        ),
    ] = None,
    policy: PolicyFile = None,
    settings: Settings = None,
    checksums: Annotated[
        bool,
        typer.Option(
            "--checksums",
            help="Instead: sums the bytes of every tensor, the first time into a file "
            "beside the checkpoint, later to compare with it.",
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Streamed against resident, unit by unit, bit for bit, on a few tokens.

    Says which weights are used outside of their module's forward, too. Exit code 1
    when anything differs.

    With `--against ORIGINAL` it measures instead: exit code 0 whatever the difference,
    1 when some rows could not be scored.

    Example: `penstock verify ./llama-3b-int4 --against ./llama-3b texts.jsonl --report
    out/`
    """
    chosen = policy_of(policy, settings, trust_remote_code)
    check_alone(chosen, "penstock verify")
    if against is not None:
        if checksums:
            raise UsageError("--checksums looks at one checkpoint: leave --against out")
        _compare(model, against, chosen, source or [], window, output, report)
        return
    needing = {
        "ROWS": source,
        "--output": output,
        "--report": report,
        "--window": window,
    }
    if given := [name for name, value in needing.items() if value]:
        raise UsageError(f"{', '.join(given)}: only with --against ORIGINAL")
    if checksums:
        _verify_checksums(model, chosen)
        return
    _verify_streamed(model, chosen)


def _compare(
    model: Path,
    original: Path,
    policy: Policy,
    source: Sequence[str],
    window: int | None,
    output: Path | None,
    report: Path | None,
) -> None:
    if window is not None and not source:
        raise UsageError("--window: only with ROWS")
    from ..files.inputs import Inputs
    from ..files.sources import Own, check_apart, find_files
    from ..quality.comparison import compare
    from ..quality.page import write_figures, write_quality
    from ..quality.stages import Stages
    from ..quality.table import summary, units_table
    from ..quality.texts import Texts
    from ..tasks.score_task import Score

    texts = None
    if source:
        files = find_files(list(source), Own(output, report))
        if output is not None:
            check_apart(output, files)
        inputs = Inputs(files, Score.row_keys)
        if inputs.is_stream:
            raise UsageError(
                "rows are read twice, once for each model, which standard input "
                "cannot be: put them into a file"
            )
        texts = Texts(inputs, window)
    try:
        found = compare(model, original, policy, texts, Stages(Console(stderr=True)))
    except KeyboardInterrupt:
        say("interrupted: nothing was written")
        raise typer.Exit(INTERRUPTED) from None
    if output is not None:
        write_figures(output, found.figures())
    if report is not None:
        write_quality(report, found)
    Console().print(units_table(found))
    for line in summary(found):
        print(line)
    if report is not None:
        say(f"a picture of the errors: {report / 'quality.html'}")
    if found.texts is not None and found.texts.rows_failed:
        raise typer.Exit(ROWS_WITH_ERRORS)


def _verify_streamed(model: Path, policy: Policy) -> None:
    from ..verify import verify as run

    result = run(model, policy)
    print(
        f"{len(result.sites_run)} of {result.num_sites} sites run, "
        f"{result.num_tensors} tensors compared with {result.reference}"
    )
    for name, count in result.faults.items():
        where = f"outside of its module's forward ({count}x)"
        print(f"fault: {readable(name)} is used {where}")
    for difference in result.differences:
        print(f"DIFFERS: {readable(difference)}")
    print("equal, bit for bit" if result.is_equal else "NOT EQUAL")
    if not result.is_equal:
        raise typer.Exit(1)


def _verify_checksums(model: Path, policy: Policy) -> None:
    from ..engine.integrity import verify_checksums

    result = verify_checksums(model, policy)
    for difference in result.differences:
        print(f"DIFFERS: {readable(difference)}")
    if result.differences:
        print(f"NOT AS SUMMED: download it again, or delete {result.side_file}")
        raise typer.Exit(1)
    if result.was_written:
        print(
            f"wrote the checksums of {result.num_tensors} tensors: {result.side_file}"
        )
    else:
        print(f"{result.num_tensors} tensors are as they were: {result.side_file}")
