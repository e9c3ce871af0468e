"""Errors that are kept keep no memory, and nobody who caught one is ended by it."""

from typing import Any

import pytest

from penstock.io.handle import forget_frames


class Held:
    """Something that a frame has in hand."""


def test_a_function_that_failed_lets_go_of_what_it_had() -> None:
    def fails() -> None:
        held = Held()
        raise ValueError(str(type(held)))

    try:
        fails()
    except ValueError as error:
        kept = error
    assert kept.__traceback__ is not None
    failed = kept.__traceback__.tb_next
    assert failed is not None
    assert "held" in failed.tb_frame.f_locals
    forget_frames(kept)
    assert "held" not in failed.tb_frame.f_locals


def test_a_coroutine_that_caught_an_error_goes_on() -> None:
    caught: list[BaseException] = []

    class Wait:
        def __await__(self) -> Any:
            yield

    async def work() -> str:
        try:
            raise OSError("gone")
        except OSError as error:
            caught.append(error)
        await Wait()
        return "done"

    running = work()
    running.send(None)
    forget_frames(caught[0])
    with pytest.raises(StopIteration, match="done"):
        running.send(None)
