"""One copy for all processes, filled once, and gone when the last of them is."""

from __future__ import annotations

import errno
import os
import signal
import textwrap
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

import forked_python
from penstock.io.errors import ClosedError, DoesNotFitError, MachineError
from penstock.io.memory.shared import FOLDER, SharedArena

pytestmark = [
    pytest.mark.usefixtures("own_processes", "no_leaks"),
    pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm"),
]

MIB = 1 << 20

resource_tracker.ensure_running()  # it stays for good: not a leak of the first test


def fill_with(byte: int) -> Any:
    def fill(arena: SharedArena) -> None:
        arena.view(0, arena.nbytes)[:] = bytes([byte]) * arena.nbytes

    return fill


def never(arena: SharedArena) -> None:
    raise AssertionError("it is filled already")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "shm"
    found.mkdir()
    return found


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_the_second_sees_what_the_first_has_filled(folder: Path) -> None:
    first = SharedArena("key", 3 * MIB + 5, fill_with(7), folder=folder)
    second = SharedArena("key", 3 * MIB + 5, never, folder=folder)
    assert (first.was_filled_here, second.was_filled_here) == (True, False)
    assert bytes(second.view(0, 3 * MIB + 5)) == b"\7" * (3 * MIB + 5)
    first.view(5, 1)[:] = b"x"
    assert bytes(second.view(5, 1)) == b"x"
    first.close()
    assert bytes(second.view(4, 3)) == b"\7x\7"
    second.close()
    assert files(folder) == []


def test_another_key_or_size_is_other_memory(folder: Path) -> None:
    with (
        SharedArena("one", MIB, fill_with(1), folder=folder) as one,
        SharedArena("two", MIB, fill_with(2), folder=folder) as two,
        SharedArena("two", MIB + 1, fill_with(3), folder=folder) as three,
    ):
        assert [bytes(x.view(0, 1)) for x in (one, two, three)] == [
            b"\1",
            b"\2",
            b"\3",
        ]
        assert len(files(folder)) == 3
    assert files(folder) == []


def test_a_failed_fill_leaves_nothing_and_the_next_one_fills(folder: Path) -> None:
    def fail(arena: SharedArena) -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        SharedArena("key", MIB, fail, folder=folder)
    assert files(folder) == []
    with SharedArena("key", MIB, fill_with(1), folder=folder) as arena:
        assert arena.was_filled_here


def test_no_room_is_said_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DoesNotFitError, match="--shm-size"):
        SharedArena("key", MIB, never, folder=folder)
    assert files(folder) == []


def test_a_closed_arena_says_so(folder: Path) -> None:
    arena = SharedArena("key", MIB, fill_with(1), folder=folder)
    assert "open" in repr(arena)
    arena.close()
    arena.close()
    assert "closed" in repr(arena)
    with pytest.raises(ClosedError):
        arena.view(0, 1)


def test_what_a_killed_process_left_is_used_or_removed(folder: Path) -> None:
    for key in ("same", "other"):
        code = f"""
            import os, signal
            from pathlib import Path
            from penstock.io.memory.shared import SharedArena
            def fill(arena):
                arena.view(0, 4)[:] = b"left"
            arena = SharedArena("same", {MIB}, fill, folder=Path({str(folder)!r}))
            os.kill(os.getpid(), signal.SIGKILL)
        """
        done = forked_python.run("-c", textwrap.dedent(code))
        assert done.returncode == -signal.SIGKILL
        assert len(files(folder)) == 1
        fill = never if key == "same" else fill_with(1)
        with SharedArena(key, MIB, fill, folder=folder) as arena:
            assert arena.was_filled_here == (key == "other")
            assert len(files(folder)) == 1
        assert files(folder) == []


def test_one_that_was_killed_while_filling_is_filled_again(folder: Path) -> None:
    code = f"""
        import os, signal
        from pathlib import Path
        from penstock.io.memory.shared import SharedArena
        def fill(arena):
            arena.view(0, 4)[:] = b"half"
            os.kill(os.getpid(), signal.SIGKILL)
        SharedArena("key", {MIB}, fill, folder=Path({str(folder)!r}))
    """
    forked_python.run("-c", textwrap.dedent(code))
    assert len(files(folder)) == 1
    with SharedArena("key", MIB, fill_with(9), folder=folder) as arena:
        assert arena.was_filled_here
        assert bytes(arena.view(0, 4)) == b"\11" * 4


def _many(folder: str, seed: int, queue: Any) -> None:
    from random import Random
    from time import sleep

    random, filled = Random(seed), 0
    ready = Path(folder).with_name("ready")

    def fill(arena: SharedArena) -> None:
        nonlocal filled
        filled += 1
        for page in range(0, arena.nbytes, 4096):
            arena.view(page, 1)[:] = b"\1"

    try:
        (ready / str(seed)).touch()
        while len(os.listdir(ready)) < 4:
            sleep(0.001)
        for _ in range(60):
            with SharedArena("key", 64 * 4096, fill, folder=Path(folder)) as arena:
                pages = range(0, arena.nbytes, 4096)
                assert all(bytes(arena.view(page, 1)) == b"\1" for page in pages)
                sleep(random.random() * 0.002)
        queue.put(filled)
    except BaseException as error:
        queue.put(repr(error))
        raise


@pytest.mark.slow
def test_processes_that_come_and_go_never_see_it_half_filled(folder: Path) -> None:
    context = forked_python.context
    queue = context.Queue()
    folder.with_name("ready").mkdir()
    processes = [
        context.Process(target=_many, args=(str(folder), seed, queue))
        for seed in range(4)
    ]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    queue.close()
    queue.join_thread()
    assert all(isinstance(filled, int) for filled in found), found
    assert sum(found) < 4 * 60  # some of them did share
    assert files(folder) == []


@pytest.fixture
def shm() -> Iterator[Path]:
    """A folder of its own in the system's shared memory."""
    folder = FOLDER / f"penstock-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    folder.rmdir()


def test_it_works_in_the_systems_shared_memory(shm: Path) -> None:
    with SharedArena("key", 5 * MIB, fill_with(3), folder=shm) as arena:
        assert bytes(arena.view(5 * MIB - 1, 1)) == b"\3"
    assert files(shm) == []


def planted(folder: Path, nbytes: int) -> Path:
    """A file that looks filled, under the name that the next arena will ask for."""
    with SharedArena("key", nbytes, fill_with(1), folder=folder) as arena:
        content = arena.path.read_bytes()
    arena.path.write_bytes(content.replace(b"\1", b"\6"))
    return arena.path


def _anybody_may_write(path: Path) -> None:
    path.chmod(0o622)


def _is_a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _is_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize("plant", [_anybody_may_write, _is_a_link, _is_a_pipe])
def test_a_file_that_others_may_have_put_there_is_refused(
    folder: Path, plant: Callable[[Path], None]
) -> None:
    plant(planted(folder, MIB))
    with pytest.raises(MachineError, match="host_shared: false"):
        SharedArena("key", MIB, never, folder=folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_file_is_neither_used_nor_removed(folder: Path) -> None:
    path = planted(folder, MIB)
    os.chown(path, 65534, 65534)
    with pytest.raises(MachineError, match="belongs to user 65534"):
        SharedArena("key", MIB, never, folder=folder)
    SharedArena("another", MIB, fill_with(2), folder=folder).close()
    assert files(folder) == [path.name]


def test_a_file_of_another_length_is_filled_anew(folder: Path) -> None:
    path = planted(folder, MIB)
    os.truncate(path, 3 * MIB)
    with SharedArena("key", MIB, fill_with(2), folder=folder) as arena:
        assert arena.was_filled_here
        with SharedArena("key", MIB, never, folder=folder) as other:
            assert bytes(other.view(0, MIB)) == b"\2" * MIB
