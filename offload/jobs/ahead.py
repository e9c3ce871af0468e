"""Makes things ahead of who needs them, on a thread of its own."""

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

from ...io.closing import Closing

Item = TypeVar("Item")


class Ahead(Closing, Generic[Item]):
    """The items of an iterator, at most `num` of them ahead. What the iterator raises
    is raised where the item would have come. Closed by `with`, which closes a generator
    on the thread that ran it."""

    def __init__(
        self,
        items: Iterator[Item],
        *,
        num: int,
        name: str,
        close_seconds: float | None = None,
    ) -> None:
        self._items = items
        self._close_seconds = close_seconds
        # Putting into it is the one thing that a signal handler may do to a thread.
        self._queue: SimpleQueue[tuple[str, Item | Exception | None]] = SimpleQueue()
        self._room = threading.Semaphore(num)
        self._is_stopping = False
        self.is_done = False
        """Whether the end was come to, or an error."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self.is_done or self._is_stopping:
            raise StopIteration
        kind, value = self._queue.get()
        if self._is_stopping:
            raise StopIteration
        self._room.release()
        self.is_done = kind != "item"
        if kind == "error":
            assert isinstance(value, Exception)
            raise value
        if kind == "end":
            raise StopIteration
        return value  # type: ignore[return-value]

    def stop(self) -> None:
        """No item comes any more, not even to who waits for one now. May be called by
        a signal handler."""
        self._is_stopping = True
        self._queue.put(("end", None))

    def close(self) -> None:
        """Waits for the thread, at most `close_seconds`: it may wait for bytes that
        nobody sends."""
        self.stop()
        self._room.release()
        self._thread.join(self._close_seconds)

    def _run(self) -> None:
        try:
            while self._has_room():
                try:
                    self._queue.put(("item", next(self._items)))
                except StopIteration:
                    self._queue.put(("end", None))
                    return
                except Exception as error:
                    self._queue.put(("error", error))
                    return
        finally:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()

    def _has_room(self) -> bool:
        self._room.acquire()
        return not self._is_stopping
