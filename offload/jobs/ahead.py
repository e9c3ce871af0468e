"""Takes items from an iterator before they are needed, on a thread of its own."""

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

from ...io.closing import Closing

Item = TypeVar("Item")


class Ahead(Closing, Generic[Item]):
    """The items of an iterator, of which at most `num` are taken before they are
    needed. An exception of the iterator is raised where its item would have come.
    Closed by `with`; a generator is closed on the thread that ran it."""

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
        # A SimpleQueue, because a signal handler may put into it.
        self._queue: SimpleQueue[tuple[str, Item | Exception | None]] = SimpleQueue()
        self._room = threading.Semaphore(num)
        self._is_stopping = False
        self.is_done = False
        """Whether the iterator has ended or raised."""
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
        """Ends the iteration, also for a thread that waits for an item now. A signal
        handler may call it."""
        self._is_stopping = True
        self._queue.put(("end", None))

    def close(self) -> None:
        """Stops, and waits for the thread, for at most `close_seconds`: it may be
        waiting for input that never comes."""
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
