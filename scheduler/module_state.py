"""State that a model keeps in its own modules between calls, one copy a micro-batch.

Most models keep theirs in a cache that the caller holds. Some write it to attributes of
their modules (recurrent states, position offsets): interleaved calls would then read
each other's. Which attributes those are is learnt by watching the first micro-batch.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

_ABSENT = object()
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}

Values = tuple[Any, ...]
"""What the watched attributes hold for one micro-batch."""


class ModuleState:
    """Swaps the attributes that calls change. Free where no call changes any."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._stores: list[dict[str, Any]] = []
        for module in modules:
            self._stores += [vars(module), module._buffers]
        self._known = [_plain(store) for store in self._stores]
        self._watched: list[tuple[dict[str, Any], str]] = []
        self._seen: set[tuple[int, str]] = set()
        self._blank: list[Any] = []

    def learn(self) -> None:
        """Finds the attributes that changed since this was made: from now on each
        micro-batch has its own, and a new one starts with what they held before."""
        for store, known in zip(self._stores, self._known, strict=True):
            now = _plain(store)
            for key in {**known, **now}:
                before, after = known.get(key, _ABSENT), now.get(key, _ABSENT)
                if before is not after and (id(store), key) not in self._seen:
                    self._seen.add((id(store), key))
                    self._watched.append((store, key))
                    self._blank.append(before)

    def take(self) -> Values:
        """The running micro-batch's values; leaves the blank ones."""
        values = tuple(store.get(key, _ABSENT) for store, key in self._watched)
        self.put(())
        return values

    def put(self, values: Values) -> None:
        """Makes `values` current; what was learnt after they were taken is blank."""
        for index, (store, key) in enumerate(self._watched):
            value = values[index] if index < len(values) else self._blank[index]
            if value is _ABSENT:
                store.pop(key, None)
            else:
                store[key] = value


def _plain(store: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in store.items() if key not in _INTERNAL}
