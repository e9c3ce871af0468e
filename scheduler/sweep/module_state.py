"""State that a model keeps in its own modules between calls, one copy a micro-batch.

Most models keep such state in a cache that the caller holds. Some write it to
attributes of their modules (recurrent states, position offsets). Interleaved calls
would then read each other's values. This module watches the micro-batches, learns which
attributes change, and swaps them.
"""

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import nn

from ...io.errors import PenstockError

_ABSENT = object()
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
# Exactly these types, no subclasses: for them `copy.copy` is known to be enough.
_BUILT_OF = ("_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks")
_CONTAINERS = frozenset((list, dict, set, deque, OrderedDict, defaultdict))

# A look walks all modules, so the number of looks is bounded. State shows early: in the
# first micro-batch, and the first times that a step from site to site occurs.
_NUM_FIRST_LOOKS = 256
_NUM_LOOKS_A_STEP = 4

Values = tuple[Any, ...]
"""The values of the watched attributes for one micro-batch."""


class ModuleState:
    """Swaps the attributes of `modules` that calls change. Costs nothing if no call
    changes any.

    Lists, dicts and sets that are changed in place are swapped, too. The old values of
    a tensor that is written in place are lost; `conflict` names such a tensor. Changes
    that lie deeper (an attribute of an attribute) are not seen.

    Hooks and submodules are shared by all micro-batches. So is a flag that is set to
    True when they are added: otherwise each micro-batch would add its own (as
    transformers does when hidden states are first requested).
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._stores: list[tuple[str, dict[str, Any]]] = []
        self._built: list[dict[str, Any]] = []
        for module in modules:
            name = type(module).__name__
            self._stores += [(name, vars(module)), (name, module._buffers)]
            self._built += [vars(module)[part] for part in _BUILT_OF]
        self._first_looks_left = _NUM_FIRST_LOOKS
        self._looks: Counter[tuple[int | None, int | None]] = Counter()
        self._watched: list[tuple[dict[str, Any], str]] = []
        self._seen: set[tuple[int, str]] = set()
        self.conflict: str | None = None
        """The name of a module's tensor that calls write to in place; None if there is
        none."""
        self.begin()

    def begin(self) -> None:
        """Records the current attributes: every new micro-batch starts with them."""
        self._num_built = sum(map(len, self._built))
        self._known: list[tuple[int, tuple[str, ...], tuple[Any, ...]]] = []
        self._contents: dict[tuple[int, str], tuple[dict[str, Any], _Blank]] = {}
        self._tensors: list[tuple[str, torch.Tensor, int]] = []
        for owner, store in self._stores:
            plain = dict(_plain(store))
            self._known.append((len(store), tuple(plain), tuple(plain.values())))
            for key, value in plain.items():
                if type(value) in _CONTAINERS:
                    self._contents[id(store), key] = (store, _Blank(value))
                elif isinstance(value, torch.Tensor) and not value.is_inference():
                    self._tensors.append((f"{owner}.{key}", value, value._version))
        self._blank = [
            self._before(store, key, store.get(key, _ABSENT))
            for store, key in self._watched
        ]

    def look(self, index: int, previous: int | None, site: int | None) -> None:
        """Micro-batch `index` went from site `previous` to `site`, where None is its
        start or end, and a number below 0 a place inside a site. Looks for changed
        attributes unless this step was looked at often enough."""
        step = (previous, site)
        if index == 0 and self._first_looks_left:
            self._first_looks_left -= 1
        elif self._looks[step] >= _NUM_LOOKS_A_STEP:
            return
        self._looks[step] += 1
        self.learn()

    def learn(self) -> None:
        """Finds the attributes that changed since `begin`. From now on they are swapped
        for each micro-batch; a new one starts with the values of `begin`."""
        before_num, self._num_built = self._num_built, sum(map(len, self._built))
        was_built = self._num_built != before_num
        for (_, store), (size, keys, values) in zip(
            self._stores, self._known, strict=True
        ):
            current = map(store.get, keys, repeat(_ABSENT))
            if len(store) == size and all(map(is_, current, values)):
                continue
            known, now = dict(zip(keys, values, strict=True)), dict(_plain(store))
            for key in {**known, **now}:
                before, after = known.get(key, _ABSENT), now.get(key, _ABSENT)
                if before is after:
                    continue
                if was_built and after is True:
                    self._seen.add((id(store), key))
                else:
                    self._watch(store, key, before)
        for (_, key), (store, blank) in self._contents.items():
            if not blank.is_unchanged():
                self._watch(store, key, blank)
        for name, tensor, version in self._tensors:
            if tensor._version != version:
                self.conflict = name

    def check(self) -> None:
        """Raises PenstockError if a tensor was written in place, which micro-batches
        would share."""
        if self.conflict is not None:
            raise PenstockError(
                f"the model writes to {self.conflict} in place, where micro-batches "
                "would read what others left: sweep with width=1"
            )

    def let_go(self) -> None:
        """Stops watching and swapping: the modules belong to another sweep now."""
        self._stores, self._built, self._watched, self._blank = [], [], [], []
        self.begin()

    def take(self) -> Values:
        """Returns the current values of the watched attributes, and resets these to the
        values of `begin`."""
        if not self._watched:
            return ()
        values = tuple(store.get(key, _ABSENT) for store, key in self._watched)
        self.put(())
        return values

    def put(self, values: Values) -> None:
        """Sets the watched attributes to `values`, and those that were found later than
        `values` were taken to their values of `begin`."""
        if not self._watched:
            return
        copies: dict[int, Any] = {}  # two modules that share an object share its copy
        for index, (store, key) in enumerate(self._watched):
            value = values[index] if index < len(values) else self._blank[index]
            if isinstance(value, _Blank):
                value = copies.setdefault(id(value.original), value.copy())
            if value is _ABSENT:
                store.pop(key, None)
            else:
                store[key] = value

    def _watch(self, store: dict[str, Any], key: str, before: Any) -> None:
        if (id(store), key) not in self._seen:
            self._seen.add((id(store), key))
            self._watched.append((store, key))
            self._blank.append(self._before(store, key, before))

    def _before(self, store: dict[str, Any], key: str, value: Any) -> Any:
        """The value of `key` at `begin`; for a container, a copy of its contents."""
        _, blank = self._contents.get((id(store), key), (None, value))
        return blank


class _Blank:
    """The contents of a container at `begin`: each micro-batch starts with a copy."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self._contents = copy.copy(original)

    def copy(self) -> Any:
        return copy.copy(self._contents)

    def is_unchanged(self) -> bool:
        now, before = self.original, self._contents
        if isinstance(now, set):
            return bool(now == before)
        if isinstance(now, dict):
            return now.keys() == before.keys() and _same(now.values(), before.values())
        return _same(now, before)


def _same(now: Collection[Any], before: Collection[Any]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


def _plain(store: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    return ((key, value) for key, value in store.items() if key not in _INTERNAL)
