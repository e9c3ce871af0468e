"""Turns pydantic's errors about a policy into sentences. Pure."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from .origin import Problem

_HIDDEN = ("int", "literal", "[key]")
"""Parts of the path of an error that are not keys."""


def explain(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """What `error` says about the keys of `model`, one problem for each error."""
    problems = []
    items = [
        (item, tuple(str(part) for part in item["loc"] if part not in _HIDDEN))
        for item in error.errors()
    ]
    misspelt = {path[:-1] for item, path in items if item["type"] == "extra_forbidden"}
    for item, path in items:
        name = ".".join(path)
        if item["type"] == "missing" and path[:-1] in misspelt:
            continue  # the key is there, but misspelt
        if item["type"] == "extra_forbidden":
            message = f"unknown key {name!r}{_which(path, model)}"
            problems.append(Problem(message, (path,), is_key=True))
        else:
            said = item["msg"].removeprefix("Value error, ")
            problems.append(Problem(f"{name}: {said} (got {item['input']!r})", (path,)))
    return problems


def _which(path: tuple[str, ...], model: type[BaseModel]) -> str:
    """A suggestion for an unknown key, and the known keys of its section."""
    *parents, name = path
    known = list(_section(model, parents).model_fields)
    meant = [key for key in _keys(model) if key.rpartition(".")[2] == name]
    near = get_close_matches(name, known, n=1)
    meant = meant or [".".join([*parents, key]) for key in near]
    guess = f" (did you mean {meant[0]!r}?)" if meant else ""
    return f"{guess}; known: {', '.join(known)}"


def _section(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for name in path:
        if name not in model.model_fields:
            continue  # it is a key of a dict of sections
        annotation: Any = model.model_fields[name].annotation
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        assert issubclass(annotation, BaseModel), f"{name} is not a section"
        model = annotation
    return model


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of `model` and its sections, except those of dicts of
    sections."""
    for name, field in model.model_fields.items():
        yield prefix + name
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield from _keys(part, f"{prefix}{name}.")
