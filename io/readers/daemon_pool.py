"""An executor with daemon threads: the interpreter does not wait for them at exit."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

from ..errors import ClosedError

Result = TypeVar("Result")


class DaemonPool(Executor):
    """Like ThreadPoolExecutor, but with daemon threads.

    At exit, the interpreter shuts a ThreadPoolExecutor down while daemon threads still
    run. A daemon thread that uses it would then fail in the middle of a read.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Any] | None]
        self._tasks = queue.SimpleQueue()
        self._lock = threading.Lock()  # no task may be queued behind the end mark
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
        """Queues `fn(*args, **kwargs)`. Raises ClosedError after `shutdown`."""
        future: Future[Result] = Future()
        with self._lock:
            if self._is_closed:
                raise ClosedError("these threads have been ended")
            self._tasks.put((future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Finishes the queued tasks, except cancelled ones, and ends the threads.

        With `wait`, waits for that. `cancel_futures` has no effect.
        """
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
                except (
                    BaseException
                ) as error:  # raised again where the future is waited for
                    future.set_exception(error)
            del task, future, call  # a mapping is freed only after its last view
