"""Reads YAML, and remembers where each value is. Pure.

A file may come from anywhere. So its depth and its number of aliases are limited: a
hundred bytes of aliases can stand for any number of values.
"""

import re
from typing import Any

import yaml

from .origin import Document, Entry, KeyPath, Mark, PolicyProblems, Problem

_MERGE = "tag:yaml.org,2002:merge"
MAX_YAML_BYTES = 1 << 20
"""Most bytes of a file with settings. Real ones have kilobytes."""
_MAX_DEPTH = 32
_OPENED = re.compile(r"(?:[\[{]\s*)" f"{{{_MAX_DEPTH + 1}}}")
_MAX_ALIASES = 16
_MAX_VALUES = 20_000


def read_yaml(text: str, source: str) -> Document:
    """The keys and values of `text`; `source` names it in errors.

    Raises PolicyProblems with line and column if it is not YAML, is not a mapping, or
    has a key twice.
    """
    found, walk = _read(text, source)
    if found is None:
        return Document({}, {})
    if not isinstance(found, yaml.MappingNode):
        raise walk.wrong(found, "must hold keys and values, not a list or one value")
    return Document(walk.mapping(found, ()), walk.entries)


def read_value(text: str, source: str) -> Any:
    """The single value in `text`; None if it is empty.

    Raises PolicyProblems as `read_yaml` does.
    """
    found, walk = _read(text, source)
    return None if found is None else walk.value(found, ())


def _read(text: str, source: str) -> tuple[yaml.Node | None, "_Walk"]:
    try:
        _check_bounds(text, source)
        loader = yaml.SafeLoader(text)
        return loader.get_single_node(), _Walk(loader, source)
    except yaml.YAMLError as error:
        raise PolicyProblems([Problem(_why_no_yaml(error, source))]) from None


def _check_bounds(text: str, source: str) -> None:
    """Raises PolicyProblems if `text` is nested more deeply, or has more aliases or
    values, than settings have. Checked before any value is made."""
    if _OPENED.search(text):  # the scanner would take for ever
        message = (
            f"{source}: not a file of settings: more than {_MAX_DEPTH} nested levels"
        )
        raise PolicyProblems([Problem(message)])
    depth = num_aliases = num_values = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        num_aliases += isinstance(event, yaml.AliasEvent)
        num_values += isinstance(event, yaml.NodeEvent)
        for found, most, what in (
            (depth, _MAX_DEPTH, "nested levels"),
            (num_aliases, _MAX_ALIASES, "aliases (*name)"),
            (num_values, _MAX_VALUES, "keys and values"),
        ):
            if found > most:
                at = event.start_mark
                assert at is not None, "each event of a text has a position"
                mark = Mark(source, at.line + 1, at.column + 1)
                message = f"{mark}: not a file of settings: more than {most} {what}"
                raise PolicyProblems([Problem(message)])


def _why_no_yaml(error: yaml.YAMLError, source: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        at, said = error.problem_mark, error.problem
        return f"{Mark(source, at.line + 1, at.column + 1)}: not valid YAML: {said}"
    return f"{source}: not valid YAML: {' '.join(str(error).split())}"


class _Walk:
    def __init__(self, loader: yaml.SafeLoader, source: str) -> None:
        self.entries: dict[KeyPath, Entry] = {}
        self._loader = loader
        self._source = source
        self._open: set[int] = set()
        self._checked: set[int] = set()
        self._left = _MAX_VALUES

    def wrong(self, node: yaml.Node, message: str) -> PolicyProblems:
        """The error `message` about `node`, with its line and column."""
        return PolicyProblems([Problem(f"{self._mark(node)}: {message}")])

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        self._check_twice(node)
        try:
            self._loader.flatten_mapping(node)  # `<<: *other`, whose keys come first
        except yaml.YAMLError as error:
            raise self.wrong(
                node, f"not valid YAML: {' '.join(str(error).split())}"
            ) from None
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            here = (*path, str(key))
            self.entries[here] = Entry(self._mark(key_node), self._mark(value_node))
            found[key if path else str(key)] = self.value(value_node, here)
        return found

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._left -= 1
        if self._left < 0:
            raise self.wrong(node, f"more than {_MAX_VALUES} values, by their aliases")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if id(node) in self._open:
            raise self.wrong(node, "this value is a part of itself; write it out")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            assert isinstance(node, yaml.SequenceNode), "there is no other kind"
            return [self.value(item, path) for item in node.value]
        finally:
            self._open.remove(id(node))

    def _key(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise self.wrong(node, "a key must be a word, not a list or a mapping")
        return self._scalar(node)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            # No such date, no such number, one of too many digits, a foreign tag.
            why = getattr(error, "problem", None) or error
            raise self.wrong(
                node, f"not valid YAML: {why} ({node.value!r:.60})"
            ) from None

    def _check_twice(self, node: yaml.MappingNode) -> None:
        if id(node) in self._checked:  # it is an alias, and flattened already
            return
        self._checked.add(id(node))
        first: dict[Any, yaml.Node] = {}
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self._key(key_node)
            if key in first:
                line = first[key].start_mark.line + 1
                raise self.wrong(
                    key_node,
                    f"{key!r} is here a second time, after line {line}; take one "
                    "of them out",
                )
            first[key] = key_node

    def _mark(self, node: yaml.Node) -> Mark:
        at = node.start_mark
        return Mark(self._source, at.line + 1, at.column + 1)
