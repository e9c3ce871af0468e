"""The base class of objects that hold threads, files or memory."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Self


class Closing(ABC):
    """A context manager that calls `close` at its end; `close` may be called again."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_all(steps: Iterable[Callable[[], object]]) -> list[Exception]:
    """Calls all `steps` in order, whatever some of them raise. Returns their errors.

    So a device that has failed does not keep files and threads open. An interrupt
    passes at once.
    """
    errors: list[Exception] = []
    for step in steps:
        try:
            step()
        except Exception as error:
            errors.append(error)
    return errors
