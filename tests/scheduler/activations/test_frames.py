"""The frames of all threads are had without stopping the interpreter."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from types import FrameType

import pytest

from penstock.scheduler.activations import referrers
from penstock.scheduler.activations.frames import current_frames


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    yield
    gc.enable()


def test_every_thread_has_its_frame() -> None:
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    try:
        frames = current_frames()
        assert frames[threading.get_ident()] is sys._getframe()
        assert thread.ident in frames
    finally:
        go.set()
        thread.join()


@pytest.mark.parametrize("was_enabled", [True, False])
def test_no_garbage_is_collected_meanwhile(
    was_enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    of_python = sys._current_frames

    def watched() -> dict[int, FrameType]:
        seen.append(gc.isenabled())
        return of_python()

    monkeypatch.setattr(sys, "_current_frames", watched)
    if not was_enabled:
        gc.disable()
    current_frames()
    assert seen == [False]
    assert gc.isenabled() == was_enabled


def test_what_fails_leaves_the_collector_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> dict[int, FrameType]:
        raise MemoryError

    monkeypatch.setattr(sys, "_current_frames", fail)
    with pytest.raises(MemoryError):
        current_frames()
    assert gc.isenabled()


def test_a_search_of_all_frames_keeps_none_of_them() -> None:
    class Held:
        """Something that a frame has in hand."""

    def search() -> weakref.ref[Held]:
        held = Held()
        assert id(held) in referrers._ids_in_running_frames()
        return weakref.ref(held)

    gc.disable()  # it would find a frame that refers to itself, but some time later
    try:
        assert search()() is None
    finally:
        gc.enable()
