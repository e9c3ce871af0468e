"""Who ends a sweep: its own thread, or one other."""

from __future__ import annotations

import contextlib
import threading

from penstock.scheduler.sweep.owner import Owner


class Work:
    can_stop = True

    def end_with_thread(self) -> None:
        pass


def test_of_threads_that_end_it_at_one_time_one_does() -> None:
    """Both have asked, and neither has got its answer."""
    owner = Owner(Work())
    met = threading.Barrier(2)
    answers: list[bool] = []

    def may_leave() -> bool:
        with contextlib.suppress(threading.BrokenBarrierError):
            met.wait(timeout=0.2)  # broken, where nobody else comes so far
        return True

    def leave() -> None:
        answers.append(owner.leave(may_leave=may_leave))

    threads = [threading.Thread(target=leave) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False, True]
    owner.has_ended()


def test_who_may_not_end_it_leaves_it_to_the_next() -> None:
    owner = Owner(Work())
    assert not owner.leave(may_leave=lambda: False)
    assert owner.leave(may_leave=lambda: True)
    assert not owner.leave(may_leave=lambda: True)
    owner.has_ended()
