"""A few threads that read parts one by one, in the order of a backlog."""

import threading
from collections.abc import Callable, Iterable
from typing import Generic

from .backlog import Backlog, Buffer, Part
from .closing import Closing
from .extent import Extent


class Workers(Closing, Generic[Buffer]):
    """`num_threads`, each of which takes a part and calls `read(extent, buffer)`. What
    that raises, the waiter for the part raises."""

    def __init__(
        self, read: Callable[[Extent, Buffer], None], *, num_threads: int
    ) -> None:
        self._read = read
        self._backlog: Backlog[Buffer] = Backlog()
        self._threads = [
            threading.Thread(target=self._work, name=f"penstock-read-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, parts: Iterable[Part[Buffer]], urgent: bool) -> None:
        self._backlog.put(parts, urgent)

    def close(self) -> None:
        """Finishes what was put; nothing may be put afterwards."""
        self._backlog.close(len(self._threads))
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (part := self._backlog.take()) is not None:
            try:
                self._read(part.extent, part.buffer)
            except BaseException as error:
                part.fail(error)
            else:
                part.handle.done()
            del part  # a mapping lives as long as its views
