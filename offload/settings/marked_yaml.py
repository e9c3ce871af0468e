"""Reads YAML, and where in it each value stands. Pure."""

from typing import Any

import yaml

from .origin import Document, Entry, KeyPath, Mark, PolicyProblems, Problem

_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(text: str, source: str) -> Document:
    """The keys and values of `text`, which is called `source`. Raises PolicyProblems
    naming line and column: where it is no YAML, holds something else, or says a key
    twice."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Document({}, {})
        walk = _Walk(loader, source)
        if not isinstance(node, yaml.MappingNode):
            raise walk.wrong(node, "must hold keys and values, not a list or one value")
        return Document(walk.mapping(node, ()), walk.entries)
    except yaml.YAMLError as error:
        raise PolicyProblems([Problem(_why_no_yaml(error, source))]) from None
    finally:
        loader.dispose()


def _why_no_yaml(error: yaml.YAMLError, source: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        at, said = error.problem_mark, error.problem
        return f"{Mark(source, at.line + 1, at.column + 1)}: no YAML: {said}"
    return f"{source}: no YAML: {' '.join(str(error).split())}"


class _Walk:
    def __init__(self, loader: yaml.SafeLoader, source: str) -> None:
        self.entries: dict[KeyPath, Entry] = {}
        self._loader = loader
        self._source = source
        self._open: set[int] = set()
        self._checked: set[int] = set()

    def wrong(self, node: yaml.Node, message: str) -> PolicyProblems:
        return PolicyProblems([Problem(f"{self._mark(node)}: {message}")])

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        self._check_twice(node)
        self._loader.flatten_mapping(node)  # `<<: *other`, whose keys come first
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            here = (*path, str(key))
            self.entries[here] = Entry(self._mark(key_node), self._mark(value_node))
            found[key if path else str(key)] = self._value(value_node, here)
        return found

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self._loader.construct_object(node)
        if id(node) in self._open:
            raise self.wrong(node, "this value is a part of itself; write it out")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            return [self._value(item, path) for item in node.value]
        finally:
            self._open.remove(id(node))

    def _key(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise self.wrong(node, "a key must be a word, not a list or a mapping")
        return self._loader.construct_object(node)

    def _check_twice(self, node: yaml.MappingNode) -> None:
        if id(node) in self._checked:  # by another name: flattened already
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
                    f"{key!r} stands here a second time, after line {line}; take one "
                    "of them out",
                )
            first[key] = key_node

    def _mark(self, node: yaml.Node) -> Mark:
        at = node.start_mark
        return Mark(self._source, at.line + 1, at.column + 1)
