"""The command `penstock policy`."""

import json
from typing import Annotated

import typer

from .options import PolicyFile, Settings, policy_of


def policy(
    file: PolicyFile = None,
    settings: Settings = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with sizes in bytes.")
    ] = False,
    schema: Annotated[
        bool, typer.Option(help="Print the JSON schema of policy files instead.")
    ] = False,
    reference: Annotated[
        bool, typer.Option(help="Print what every key means instead, as Markdown.")
    ] = False,
    names: Annotated[
        bool, typer.Option("--list", help="Print the names of shipped policies.")
    ] = False,
) -> None:
    """Prints the policy that a file and settings make, defaults and all, as YAML.

    Example: `penstock policy --policy laptop-16gb-ram-nvme --set device_memory=2GiB >
    mine.yaml`
    """
    from ..settings.extends import shipped
    from ..settings.reference import policy_schema, policy_text, reference_text

    if schema:
        print(json.dumps(policy_schema(), indent=2))
    elif reference:
        print(reference_text(), end="")
    elif names:
        print("\n".join(shipped()))
    else:
        chosen = policy_of(file, settings)
        if as_json:
            print(json.dumps(chosen.model_dump(mode="json"), indent=2))
        else:
            print(policy_text(chosen), end="")
