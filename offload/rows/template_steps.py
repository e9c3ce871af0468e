"""Finds out how much text a step of a chat template makes, before it makes it."""

from collections.abc import Mapping, Sized
from typing import Any


class TemplateError(ValueError):
    """A template ran for too long, or made too much text."""


class Stopped(BaseException):
    """The same while the template runs. It is not an Exception, so templates' functions
    do not catch it."""


def check_step(name: str, values: Mapping[str, Any], most: int) -> None:
    """Raises Stopped if jinja's function `name`, called with `values`, would make more
    than `most` characters."""
    match name, dict(values):
        case "do_join" | "sync_do_join", {"value": parts, "d": between}:
            made = _size(parts) * _size(between)
        case "do_replace", {"s": text, "old": old, "new": new}:
            made = _count(text, old) * _size(new)
        case "do_indent", {"s": text, "width": width}:
            made = _count(text, "\n") * max(_size(width), _number(width))
        case "do_format", {"value": form, "args": args, "kwargs": named}:
            sizes = map(_size, (*args, *named.values()))
            made = _count(form, "%") * max(sizes, default=0)
        case "call", {
            "_SandboxedEnvironment__obj": method,
            "args": args,
            "kwargs": named,
        }:
            method = getattr(method, "__wrapped__", method)  # jinja's own `format`
            made = _made_by(method, (*args, *named.values()))
        case _:
            made = 0
    if made > most:
        raise Stopped("it makes too much text")


def _made_by(method: Any, args: tuple[Any, ...]) -> int:
    """The most characters that a method of a text makes, called with `args`."""
    text = getattr(method, "__self__", None)
    if not isinstance(text, str):
        return 0
    match getattr(method, "__name__", ""), args:
        case "join", (parts, *_):
            return _size(parts) * len(text)
        case "replace", (old, new, *_):
            return _count(text, old) * _size(new)
        case "expandtabs", (width, *_):
            return text.count("\t") * _number(width)
        case "translate", (table, *_) if isinstance(table, Mapping):
            return len(text) * max(map(_size, table.values()), default=0)
        case "format" | "format_map", _:
            return text.count("{") * max(map(_size, args), default=0)
        case "center" | "ljust" | "rjust" | "zfill", (width, *_):
            return _number(width)
    return 0


def _size(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else 0


def _count(text: Any, part: Any) -> int:
    if not isinstance(text, str) or not isinstance(part, str):
        return 0
    return text.count(part)


def _number(value: Any) -> int:
    return int(value) if isinstance(value, int) else 0
