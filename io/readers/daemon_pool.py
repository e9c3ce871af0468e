"""An executor whose threads end with the interpreter, in whatever they are."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

from ..errors import ClosedError

Result = TypeVar("Result")


class DaemonPool(Executor):
    """Like ThreadPoolExecutor, which the interpreter ends before daemon threads: those
    would then fail, with a traceback, in the middle of a read."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Any] | None]
        self._tasks = queue.SimpleQueue()
        self._lock = threading.Lock()  # nothing is put behind the end
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}_{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any
    ) -> Future[Result]:
        future: Future[Result] = Future()
        with self._lock:
            if self._is_closed:
                raise ClosedError("these threads have been ended")
            self._tasks.put((future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Does what was given, unless it is cancelled, and ends the threads."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                for _ in self._threads:
                    self._tasks.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, call = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # raised by whoever waits
                    future.set_exception(error)
            del task, future, call  # a mapping lives as long as its views
