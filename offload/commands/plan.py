"""The commands that look ahead: `penstock machine` and `penstock plan`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...io.errors import OutputError, UsageError, readable
from ...io.fallbacks import Fallbacks
from ..tasks.registry import TASKS
from .options import (
    PolicyFile,
    Settings,
    TaskName,
    TrustRemoteCode,
    policy_of,
    say,
)


class ObjectiveName(StrEnum):
    """What the planner optimizes."""

    throughput = "throughput"
    latency = "latency"


MachineName = Annotated[
    str | None,
    typer.Option(
        "--machine",
        help="File of a machine, or the name of one that comes with Penstock. Without "
        "it: this computer, as `penstock machine` measured it, or by quick estimates.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Adds the commands of this file to `app`."""
    app.command()(machine)
    app.command()(plan)


def machine(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="YAML file to write. Without it: the user's cache folder, where other "
            "commands find it.",
        ),
    ] = None,
    disk: Annotated[
        Path,
        typer.Option(
            help="Folder on the drive that checkpoints lie on (1 GiB is written there "
            "and removed), or a large file on it, which is read."
        ),
    ] = Path("."),
    device: Annotated[
        str, typer.Option(help="What computes: cpu, cuda or cuda:1.")
    ] = "cpu",
) -> None:
    """Measures this computer once, in about a minute, into a file to read and edit.

    Products by rows and dtype, memory, copies to and from a GPU, the drive by each
    reader, cores, and what calls cost. Leave the computer alone meanwhile.
    """
    from ..engine.readers import makers_of
    from ..machines.machine import own_machine_path
    from ..machines.measuring import check_measurable, measure_machine
    from ..machines.readers_found import reader_lines
    from ..policy import IO
    from ..settings.user_cache import user_cache

    check_measurable(disk, device)
    path = output or own_machine_path()
    if (no_cache := user_cache().fallback) is not None:
        say(no_cache)
    console = Console(stderr=True)
    with console.status("measuring") as status:

        def progress(part: str) -> None:
            status.update(f"measuring: {part}")
            if not console.is_terminal:
                console.print(f"measuring: {part}", soft_wrap=True)

        try:
            found = measure_machine(disk, IO(), progress, device=device)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot measure or write {path}: {error}") from error
    _, missing = makers_of({}, IO(), Fallbacks())
    if device != "cpu":
        missing["gds"] = "it reads into the GPU's memory, which is not measured"
    if found.disk is not None:
        for line in reader_lines(found.disk, missing):
            console.print(line, soft_wrap=True, highlight=False)
    print(path)


def plan(
    model: Annotated[
        Path,
        typer.Argument(
            help="Folder of a Hugging Face checkpoint; its config.json is enough."
        ),
    ],
    policy: PolicyFile = None,
    settings: Settings = None,
    machine: MachineName = None,
    task: Annotated[TaskName, typer.Option(help="What to plan for.")] = "score",
    prompt: Annotated[
        int, typer.Option(min=1, help="Tokens of a row, or of a prompt.")
    ] = 128,
    new: Annotated[
        int, typer.Option(min=1, help="Tokens that each prompt gets, of generate.")
    ] = 64,
    ranks: Annotated[
        int,
        typer.Option(
            min=1,
            help="Plan for so many ranks that share the model (see docs/ranks.md).",
        ),
    ] = 1,
    nodes: Annotated[
        int,
        typer.Option(
            min=1, help="Machines like this one that --ranks are on, equally many each."
        ),
    ] = 1,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Price of an hour of the machine, in any currency, instead of "
            "price_per_hour in its file: says what a million tokens cost.",
        ),
    ] = None,
    objective: Annotated[
        ObjectiveName,
        typer.Option(help="Most tokens a second, or one batch as soon as possible."),
    ] = ObjectiveName.throughput,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead.")
    ] = False,
    as_yaml: Annotated[
        bool,
        typer.Option("--yaml", help="Print the resolved policy, for --policy."),
    ] = False,
    pareto: Annotated[
        Path | None,
        typer.Option(
            help="PNG or SVG file: latency against throughput over what is in flight."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """What fits, how fast it will be, what binds it: before a byte is loaded.

    What the policy leaves open is chosen: what is in flight, what stays in memory,
    the dtype on a CPU, where keys and values are. Rates of this computer are those of
    `penstock machine` or, before that was run, quick estimates; its memory is what a
    cgroup's limit leaves of it. Exit code 3 where the machine cannot run the model,
    with what would make it run.
    """
    from ..machines.machine import find_machine
    from ..monitoring.memory import installed_bytes
    from ..plans.pareto import check_plot, plot_pareto
    from ..plans.plan import make_plan
    from ..plans.planned import Workload
    from ..plans.ranked import RankGroup
    from .plan_table import devices_table, plan_table

    asked = policy_of(policy, settings, trust_remote_code)
    if as_json and as_yaml:
        raise UsageError("--json and --yaml print different things: give one of them")
    if asked.ranks is not None and ranks == 1:
        raise UsageError(
            f"ranks: {asked.ranks} is planned for a number of ranks: give --ranks, or "
            "take ranks out of the policy"
        )
    if nodes > 1 and ranks == 1:
        raise UsageError(f"--nodes {nodes} is where ranks are: give --ranks, too")
    group = RankGroup(ranks, nodes) if ranks > 1 else None
    if pareto is not None:
        check_plot(pareto)
    found = find_machine(machine, asked.io.cache)
    wanted = Workload(TASKS[task].typical(new), prompt)
    made = make_plan(
        model,
        asked,
        found,
        wanted,
        "latency" if objective is ObjectiveName.latency else "throughput",
        host_bytes=installed_bytes() if machine is None else None,
        ranks=group,
        price_per_hour=price_per_hour,
    )
    if as_json:
        print(json.dumps(made.to_json(), indent=2))
    elif as_yaml:
        print(made.to_yaml(), end="")
    else:
        print(readable(made.title))
        Console().print(plan_table(made))
        for sentence in made.sentences:
            print(f"- {sentence}")
        if made.devices is not None:
            Console().print(devices_table(made.devices))
            if (best := made.devices.best) is not None:
                how = f" ({best.how})" if best.how else ""
                print(f"fastest of those that run here: {best.name}{how}")
            for switch in made.devices.switches:
                print(switch.sentence)
    if pareto is not None:
        plot_pareto(made, pareto)
        if not (as_json or as_yaml):
            print(pareto)
