"""The command that measures around a plan: `penstock tune`."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ...io.errors import StoppedError, UsageError
from ..tasks.registry import TASKS
from .options import (
    SOURCES,
    Model,
    PolicyFile,
    Restart,
    Settings,
    TaskName,
    TrustRemoteCode,
    check_alone,
    policy_of,
    say,
)
from .plan import MachineName

if TYPE_CHECKING:
    from ..tuning.race import Timing
    from ..tuning.tune import Tuning


def add_to(app: typer.Typer) -> None:
    """Adds the command of this file to `app`."""
    app.command()(tune)


def tune(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="YAML file to write, for --policy. What was measured is kept beside "
            "it: killed and run again, the search goes on.",
        ),
    ],
    source: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT]...",
            help="The job's rows, whose first ones are measured with. Without it: "
            "rows of made-up tokens. "
            + SOURCES.replace(", or - for standard input", ""),
        ),
    ] = None,
    policy: PolicyFile = None,
    settings: Settings = None,
    machine: MachineName = None,
    task: Annotated[TaskName, typer.Option(help="What to tune for.")] = "score",
    prompt: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a made-up row, or prompt (default: 128)."),
    ] = None,
    new: Annotated[
        int, typer.Option(min=1, help="Tokens that each prompt gets, of generate.")
    ] = 64,
    restart: Restart = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measures around the plan, and writes the fastest policy.

    Starts from what `penstock plan` chooses; keys that you set stay. Tries a few other
    values of what matters (what is in flight, memory, readers, lookahead, coalesce) on
    short slices of the job: the better half goes on to longer ones, and in the end the
    best run in turn with the plan. What has not clearly beaten it is not taken.

    Example: `penstock tune ./llama-3b texts.jsonl -o tuned.yaml`
    """
    from ..files.durable import DurableFiles
    from ..machines.machine import find_machine
    from ..plans.plan import make_plan
    from ..plans.planned import Workload
    from ..settings.room import coming_with, room_for
    from ..tuning.log import TuneLog, write
    from ..tuning.race import Verdict
    from ..tuning.slices import made_up, sample_of
    from ..tuning.tune import Tuning
    from ..tuning.tuned import tuned_yaml, verdict_line

    chosen = policy_of(policy, settings, trust_remote_code)
    check_alone(chosen, "penstock tune")
    found = find_machine(machine, chosen.io.cache)
    if source and prompt is not None:
        raise UsageError(
            "rows of INPUT have the lengths that they have: leave --prompt out"
        )
    wanted = TASKS[task].typical(new)
    sample = (
        sample_of(source, model, wanted, trust_remote_code=chosen.trust_remote_code)
        if source
        else made_up(wanted, prompt or 128)
    )
    plan = make_plan(
        model,
        chosen,
        found,
        Workload(wanted, sample.mean_length),
        host_bytes=room_for(chosen, coming_with(model)).total,
    )
    tuning = Tuning(plan, sample)
    if not tuning.tried:
        raise UsageError(
            "the policy sets all that could be tried: take keys out, or set them to "
            "auto"
        )
    log = TuneLog(output, tuning.job, restart=restart)
    try:
        with _showing(tuning, log.timings) as show:
            for step in tuning.run(log):
                if isinstance(step, Verdict):
                    verdict = step
                else:
                    show(step)
    except KeyboardInterrupt:
        raise StoppedError(
            f"stopped: {len(log.timings)} measurements are kept in {log.path}; run the "
            "same command again to go on",
            signal.SIGINT,
        ) from None
    write(DurableFiles(), output, tuned_yaml(tuning, verdict, log.timings))
    say(verdict_line(verdict))
    print(output)


class _Show:
    """Shows how far a search is: as a bar on a terminal, as plain lines elsewhere."""

    def __init__(
        self, tuning: "Tuning", timings: "list[Timing]", console: Console
    ) -> None:
        from ..monitoring.progress import search_bar

        self._tuning, self._timings, self._console = tuning, timings, console
        self._slices_first = tuning.slices_left(timings)
        self._began = time.monotonic()
        self._bar = search_bar(console)
        self._task = self._bar.add_task(
            "tuning", total=self._slices_first, remark="", left="?"
        )

    def __call__(self, timing: "Timing") -> None:
        from ..monitoring.show import human_seconds
        from ..tuning.race import name_of

        left = self._tuning.slices_left(self._timings)
        done = max(1, self._slices_first - left)
        seconds = (time.monotonic() - self._began) / done * left
        what = "out" if timing.rate is None else f"{timing.rate:,.1f} tokens/s"
        remark = f"{name_of(timing.settings)}: {what}"
        self._bar.update(
            self._task,
            completed=done,
            total=done + left,
            remark=remark,
            left=human_seconds(seconds),
        )
        self._console.out(
            f"penstock: {len(self._timings)} measured, rung {timing.rung + 1}, "
            f"{remark}, {human_seconds(seconds)} left",
            highlight=False,
        )

    def start(self) -> None:
        self._bar.start()

    def close(self) -> None:
        self._bar.stop()


def _first_words(tuning: "Tuning", timings: "list[Timing]") -> str:
    """One sentence, printed before the first measurement, that says how many will be
    made and how long they may take."""
    from ..monitoring.show import human_seconds
    from ..tuning.race import heats_left

    left = list(heats_left(tuning.tried, timings))
    if not left:
        return f"all {len(timings)} measurements are there"
    work = tuning.slice_of(max(heat.slices for heat in left))
    what = f"{sum(work.lengths):,} tokens"
    if work.task.keeps_kv:
        what = f"{len(work.rows):,} rows that get {work.task.new_tokens} tokens"
    seconds = tuning.predicted_seconds(timings)
    took = "" if seconds is None else f"; about {human_seconds(seconds)} and loading"
    began = f"goes on after {len(timings)} measurements: " if timings else ""
    return (
        f"{began}at most {len(left)} to make, of the plan and {len(tuning.tried)} "
        f"beside it, with up to {what}{took}, by the plan (with fewer in flight it is "
        "shorter)"
    )


@contextmanager
def _showing(tuning: "Tuning", timings: "list[Timing]") -> Iterator[_Show]:
    console = Console(stderr=True)
    say(_first_words(tuning, timings))
    show = _Show(tuning, timings, console)
    show.start()
    try:
        yield show
    finally:
        show.close()
