"""The options of a task as options of the command line."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from inspect import Parameter
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from ..settings.values import parse_setting
from ..tasks.task import Task, options_of


def parameters_of(task: type[Task]) -> list[Parameter]:
    """A parameter for each option of `task`, in order, annotated as typer needs it."""
    kinds, defaults = get_type_hints(task), {each.name: each for each in fields(task)}
    found = []
    for name, option in options_of(task).items():
        flags = [] if option.flag is None else [option.flag]
        given = typer.Option(*flags, help=option.help, metavar=option.metavar)
        kind, default = kinds[name], defaults[name].default
        if get_origin(kind) in (tuple, Mapping):
            kind, default = list[str] | None, None
        found.append(
            Parameter(
                name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if default is MISSING else default,
                annotation=Annotated[kind, given],
            )
        )
    return found


def task_from(task: type[Task], values: Mapping[str, Any]) -> Task:
    """`task` with its options from the command line. Raises UsageError for values that
    are wrong."""
    kinds = get_type_hints(task)
    return task(**{name: _read(kinds[name], value) for name, value in values.items()})


def _read(kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple:
        return tuple(value or ())
    if get_origin(kind) is Mapping:
        return dict(map(parse_setting, value or ()))
    return value
