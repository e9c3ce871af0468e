"""Decides whether anything outside a suspended micro-batch refers to its objects.

Python counts references and does not say where they are. Most of them were found in the
micro-batch's frames; some are the interpreter's own (arguments of a call under way).
The garbage collector can find the others, but it searches all objects for that. So it
is asked once for each pattern, and the answer is remembered. A pattern is an object's
type, what holds it, its reference count and the place in the program.
"""

import gc
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any

import torch

from .frames import current_frames
from .held import values_of

_MAX_LOOKS = 256
"""A look takes 0.05 to 0.5 s. A pattern that is new after so many counts as foreign."""
_MAX_STEPS = 8
_NUM_EXAMPLES = 4
"""How many objects of one pattern are looked at, at most."""
_PASSING = (tuple, dict, CellType, FunctionType)
"""Types that a call creates. Such an object is foreign if anything but a call holds it.
"""
_HERE = __name__.rpartition(".")[0]

Where = tuple[tuple[CodeType, int], ...]


class Node:
    """A tensor of a micro-batch, or a container that leads to one."""

    __slots__ = ("children", "depth", "is_foreign", "kind", "leads", "parents", "value")

    def __init__(self, value: Any, depth: int) -> None:
        self.value = value
        self.depth = depth
        self.kind: Counter[Any] = Counter()
        """How often it was found, by the type of its holder and its name there."""
        self.parents: list[Node] = []
        self.children: list[Node] = []
        self.leads = False
        """Whether a tensor lies below it."""
        self.is_foreign = False


class Referrers:
    """Decides which nodes are foreign, and remembers the patterns that it has seen."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[int, int], ...], dict[Any, bool]] = {}
        self._codes: dict[int, CodeType] = {}  # kept alive, for their ids
        self.num_looks = 0

    def judge(self, where: Where, nodes: Collection[Node]) -> None:
        """Marks each of `nodes` to which an object outside `nodes` refers as foreign.
        `where` is the place in the program where the micro-batch is suspended."""
        self._codes.update((id(code), code) for code, _ in where)
        place = tuple((id(code), at) for code, at in where)
        known = self._known.setdefault(place, {})
        patterns = [_pattern(node) for node in nodes]
        new: dict[Any, list[Node]] = {}
        for node, pattern in zip(nodes, patterns, strict=True):
            if pattern not in known:
                new.setdefault(pattern, []).append(node)
        # `gc.get_referrers` does not find frozen objects.
        if new and self.num_looks < _MAX_LOOKS and not gc.get_freeze_count():
            self.num_looks += 1
            examples = [node for some in new.values() for node in some[:_NUM_EXAMPLES]]
            foreign = _foreign(examples, {id(node.value) for node in nodes})
            for pattern, some in new.items():
                known[pattern] = any(id(node.value) in foreign for node in some)
        for node, pattern in zip(nodes, patterns, strict=True):
            node.is_foreign |= known.get(pattern, True)


def _pattern(node: Node) -> Any:
    value = node.value
    references = [sys.getrefcount(value)]
    if isinstance(value, torch.Tensor):
        references.append(_num_owners(value))
    return type(value), *references, frozenset(node.kind.items())


def _num_owners(tensor: torch.Tensor) -> int:
    """The number of owners: 1 for Python, plus C++ owners such as autograd."""
    return int(tensor._use_count())  # type: ignore[attr-defined]


def _foreign(nodes: Sequence[Node], inside: set[int]) -> set[int]:
    """The ids of the values of `nodes` to which an object not in `inside` (ids) refers,
    directly or through objects that a call creates."""
    foreign = _ids_in_running_frames()
    for node in nodes:
        if isinstance(node.value, torch.Tensor) and _num_owners(node.value) != 1:
            foreign.add(id(node.value))  # autograd or another C++ object owns it
    asked: list[Any] = [node.value for node in nodes]
    # By the id of an object: the values that are foreign if that object is.
    stakes: dict[int, set[int]] = {id(value): {id(value)} for value in asked}
    for step in range(_MAX_STEPS):
        passing: list[Any] = []
        for holder in gc.get_referrers(*asked):
            is_ours = holder is asked or holder is passing or type(holder) is Node
            if is_ours or id(holder) in inside:
                continue
            at_stake: set[int] = set()
            for part in gc.get_referents(holder):
                at_stake |= stakes.get(id(part), set())
            if type(holder) not in _PASSING or step == _MAX_STEPS - 1:
                foreign |= at_stake
            elif not at_stake <= stakes.get(id(holder), set()):
                stakes.setdefault(id(holder), set()).update(at_stake)
                passing.append(holder)
        if not passing:
            break
        asked = passing
    return foreign


def _ids_in_running_frames() -> set[int]:
    """The ids of the local variables of all running frames: `gc.get_referrers` does not
    find these references."""
    ids: set[int] = set()
    for top in current_frames().values():
        frame: FrameType | None = top
        while frame is not None:
            if not str(frame.f_globals.get("__name__")).startswith(_HERE):
                ids.update(id(value) for _, value in values_of(frame))
            frame = frame.f_back
    # One of them is this function's own, which would keep itself and its callers alive.
    del top
    return ids
