"""Finds the storages that one suspended micro-batch alone uses, so that they may be
moved.

A storage may be moved if all of this holds:
- It lies on the device, is large enough, and can be resized (memory of numpy, of files,
  of slots and of other processes cannot).
- Every tensor that views it was found in the frames of this micro-batch. So no other
  code, and no autograd graph, has a view of it.
- Every reference on the way to these tensors is the micro-batch's own. It does not come
  from its batch, from a closure, from another micro-batch or from an outside object
  such as a module, a hook's list or a global.

A storage for which this cannot be shown stays where it is.
"""

import sys
from functools import partial
from types import CodeType, FrameType
from typing import Any

import torch

from .held import parts_of, values_of
from .referrers import Node, Referrers

_MAX_DEPTH = 12
_MAX_NODES = 20_000


class Ownership:
    """Searches suspended micro-batches, each identified by its index, and remembers
    which storages each of them reaches, so that no other one moves these."""

    def __init__(self, device: torch.device, *, min_bytes: int) -> None:
        self._device = device
        self._min_bytes = min_bytes
        self._referrers = Referrers()
        self._reached: dict[int, frozenset[int]] = {}
        """By micro-batch: the addresses of the storages that it reaches."""

    def forget(self, index: int) -> None:
        """Micro-batch `index` resumes, or has ended."""
        self._reached.pop(index, None)

    def own(
        self, index: int, frame: FrameType | None, work: "partial[Any]"
    ) -> list[torch.UntypedStorage]:
        """The storages that only micro-batch `index` uses. It is suspended in `frame`
        and runs `work`, a function and its batch."""
        walk = _Walk(self._min_bytes)
        try:
            walk.add(work.args, None, "batch", is_foreign=True)
            walk.add(work.keywords, None, "batch", is_foreign=True)
            walk.skip(getattr(work.func, "__self__", None))
            where: list[tuple[CodeType, int]] = []
            while frame is not None:
                where.append((frame.f_code, frame.f_lasti))
                for name, value in values_of(frame):
                    if name not in frame.f_code.co_freevars:
                        walk.add(value, None, (len(where), name))
                frame = frame.f_back
            walk.run()
            tensors = walk.tensors()
            if not tensors:
                self._reached[index] = frozenset()
                return []
            self._referrers.judge(tuple(where), walk.nodes.values())
            walk.spread()
            return self._choose(index, tensors)
        finally:
            walk.clear()

    def _choose(self, index: int, tensors: list[Node]) -> list[torch.UntypedStorage]:
        views: dict[int, list[Node]] = {}
        storages: dict[int, torch.UntypedStorage] = {}
        others_objects: set[int] = set()
        for node in tensors:
            storage = node.value.untyped_storage()
            address = storage._cdata
            if address not in storages:
                storages[address] = storage
                # torch makes one Python object for a storage: is it referred to?
                if sys.getrefcount(storage) > _REFERENCES_TO_A_NEW_ONE + 1:
                    others_objects.add(address)
            views.setdefault(address, []).append(node)
        others = frozenset().union(
            *(reached for other, reached in self._reached.items() if other != index)
        )
        self._reached[index] = frozenset(storages)
        return [
            storage
            for address, storage in storages.items()
            if address not in others
            and address not in others_objects
            and not any(node.is_foreign for node in views[address])
            and self._is_movable(storage)
            and _num_views(storage) == len(views[address])
        ]

    def _is_movable(self, storage: torch.UntypedStorage) -> bool:
        return (
            storage.nbytes() >= self._min_bytes
            and storage.device == self._device
            and storage.resizable()
            and not (storage.device.type == "cpu" and storage.is_shared())
        )


def _references_to_a_new_one() -> int:
    tensor = torch.empty(1)
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage)


_REFERENCES_TO_A_NEW_ONE = _references_to_a_new_one()
"""The reference count of a new storage object that one variable refers to."""


def _num_views(storage: torch.UntypedStorage) -> int:
    """The number of tensors that view `storage`, in Python and in C++."""
    # One use is the Python object `storage` itself.
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1


class _Walk:
    """Searches from frames down to tensors, and visits each object once."""

    def __init__(self, min_bytes: int) -> None:
        self.nodes: dict[int, Node] = {}
        self._all: list[Node] = []
        self._min_bytes = min_bytes
        self._open: list[Node] = []
        self._skipped: set[int] = set()

    def skip(self, value: Any) -> None:
        self._skipped.add(id(value))

    def add(
        self, value: Any, parent: Node | None, name: Any, *, is_foreign: bool = False
    ) -> None:
        if id(value) in self._skipped:
            return
        node = self.nodes.get(id(value))
        if node is None:
            depth = 0 if parent is None else parent.depth + 1
            if depth > _MAX_DEPTH or len(self.nodes) > _MAX_NODES:
                return
            if not isinstance(value, torch.Tensor) and parts_of(value) is None:
                return
            node = self.nodes[id(value)] = Node(value, depth)
            self._all.append(node)
            self._open.append(node)
        if parent is not None:
            node.parents.append(parent)
            parent.children.append(node)
        node.is_foreign |= is_foreign
        node.kind[name if parent is None else (type(parent.value), name)] += 1

    def run(self) -> None:
        while self._open:
            node = self._open.pop()
            for name, part in parts_of(node.value) or ():
                self.add(part, node, name)

    def tensors(self) -> list[Node]:
        """The tensors that view enough memory. Marks the nodes that lead to them and
        forgets the others."""
        tensors = [
            node
            for node in self.nodes.values()
            if _num_bytes(node.value) >= self._min_bytes
        ]
        above = list(tensors)
        while above:
            node = above.pop()
            if not node.leads:
                node.leads = True
                above.extend(node.parents)
        self.nodes = {key: node for key, node in self.nodes.items() if node.leads}
        return tensors

    def clear(self) -> None:
        """Drops all references: nodes refer to each other in cycles."""
        for node in self._all:
            node.value = None
            node.parents.clear()
            node.children.clear()

    def spread(self) -> None:
        """Marks as foreign every node below a foreign one."""
        below = [node for node in self.nodes.values() if node.is_foreign]
        while below:
            for child in below.pop().children:
                if child.leads and not child.is_foreign:
                    child.is_foreign = True
                    below.append(child)


def _num_bytes(value: Any) -> int:
    """The bytes of the storage of a plain dense tensor; 0 for any other value."""
    if type(value) is not torch.Tensor or value.layout is not torch.strided:
        return 0
    if value.is_nested or value.device.type == "meta":
        return 0
    try:
        return value.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):  # inside of a function transform
        return 0


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """All of `storage` as a tensor of uint8, (bytes,)."""
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return whole.set_(storage, 0, (storage.nbytes(),))  # type: ignore[call-overload, no-any-return]
