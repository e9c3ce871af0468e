"""Memory is pinned in pieces, as far as it goes, and all of it is given free again."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from gpu_device import GPU, NAME

from penstock.io.devices.accelerators import module_of
from penstock.io.memory.arena import Arena
from penstock.io.memory.pinned import Pinned, Registrar, registrar_of

pytestmark = pytest.mark.usefixtures("no_leaks")

PAGE = mmap.PAGESIZE
OUT_OF_MEMORY = 2


@dataclass
class FakeRegistrar:
    """Records what is pinned; from the `refuse_after`-th piece on it refuses."""

    refuse_after: int = 1 << 30
    raise_after: int = 1 << 30
    refuse_unregister: bool = False
    raise_unregister: bool = False
    pieces: dict[int, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def register(self, address: int, nbytes: int) -> int:
        self.calls.append("register")
        if self.calls.count("register") > self.raise_after:
            raise RuntimeError("CUDA is gone")
        if self.calls.count("register") > self.refuse_after:
            return OUT_OF_MEMORY
        assert address % PAGE == nbytes % PAGE == 0
        assert nbytes > 0
        for start, length in self.pieces.items():
            assert address + nbytes <= start or start + length <= address
        self.pieces[address] = nbytes
        return 0

    def unregister(self, address: int) -> int:
        self.calls.append("unregister")
        del self.pieces[address]  # KeyError, where it is not pinned
        if self.raise_unregister:
            raise RuntimeError("CUDA is gone")
        return 1 if self.refuse_unregister else 0


@pytest.fixture
def memory() -> Iterator[memoryview]:
    with Arena(16 * PAGE) as arena:
        view = arena.view(0, 16 * PAGE)
        yield view
        view.release()


def pin(
    memory: memoryview,
    registrar: Registrar,
    *,
    max_bytes: int = 1 << 40,
    chunk_bytes: int = 4 * PAGE,
) -> Pinned:
    return Pinned(
        memory, max_bytes=max_bytes, chunk_bytes=chunk_bytes, registrar=registrar
    )


@pytest.mark.parametrize("chunk_bytes", [1, PAGE, 3 * PAGE + 5, 1 << 30])
def test_all_of_it_is_pinned_and_given_free_again(
    chunk_bytes: int, memory: memoryview
) -> None:
    registrar = FakeRegistrar()
    with pin(memory, registrar, chunk_bytes=chunk_bytes) as pinned:
        assert pinned.pinned_bytes == sum(registrar.pieces.values()) == 16 * PAGE
        assert max(registrar.pieces.values()) <= max(chunk_bytes, PAGE)
        assert pinned.fallback is None
        assert f"{16 * PAGE}/{16 * PAGE}" in repr(pinned)
    assert registrar.pieces == {}
    assert pinned.pinned_bytes == 0


def test_only_whole_pages_are_pinned(memory: memoryview) -> None:
    registrar = FakeRegistrar()
    with memory[100 : 10 * PAGE + 100] as part, pin(part, registrar) as pinned:
        assert pinned.pinned_bytes == sum(registrar.pieces.values()) == 9 * PAGE
        assert pinned.fallback is None


@pytest.mark.parametrize("nbytes", [0, 1, PAGE - 1])
def test_less_than_a_page_is_not_pinned(nbytes: int, memory: memoryview) -> None:
    registrar = FakeRegistrar()
    with memory[1 : 1 + nbytes] as part, pin(part, registrar) as pinned:
        assert pinned.pinned_bytes == 0
        assert list(pinned.cut(0, nbytes)) == ([(0, nbytes, False)] if nbytes else [])
    assert registrar.calls == []


def test_a_cap_is_kept_and_named(memory: memoryview) -> None:
    registrar = FakeRegistrar()
    with pin(memory, registrar, max_bytes=6 * PAGE + 1) as pinned:
        assert pinned.pinned_bytes == sum(registrar.pieces.values()) == 6 * PAGE
        assert pinned.fallback is not None
        for wanted in (str(6 * PAGE), str(16 * PAGE), "raise the cap", "host_memory"):
            assert wanted in pinned.fallback


@pytest.mark.parametrize("num_pieces", [0, 1, 3])
def test_what_is_refused_stays_unpinned_and_is_named(
    num_pieces: int, memory: memoryview
) -> None:
    registrar = FakeRegistrar(refuse_after=num_pieces)
    with pin(memory, registrar) as pinned:
        assert pinned.pinned_bytes == num_pieces * 4 * PAGE
        assert len(registrar.pieces) == num_pieces
        assert registrar.calls.count("register") == num_pieces + 1  # and no more
        assert pinned.fallback is not None
        assert f"only {num_pieces * 4 * PAGE} of {16 * PAGE} bytes" in pinned.fallback
        for wanted in (f"CUDA error {OUT_OF_MEMORY}", "ulimit -l", "host_memory"):
            assert wanted in pinned.fallback
    assert registrar.pieces == {}


def test_closing_twice_gives_free_once(memory: memoryview) -> None:
    registrar = FakeRegistrar(refuse_after=2)
    pinned = pin(memory, registrar)
    pinned.close()
    pinned.close()
    assert registrar.calls.count("unregister") == 2


def test_an_error_while_pinning_leaves_nothing_pinned(memory: memoryview) -> None:
    registrar = FakeRegistrar(raise_after=2)
    with pytest.raises(RuntimeError, match="CUDA is gone"):
        pin(memory, registrar)
    assert registrar.pieces == {}
    assert registrar.calls.count("unregister") == 2


def test_pieces_that_cannot_be_given_free_are_all_tried_and_said(
    memory: memoryview, caplog: pytest.LogCaptureFixture
) -> None:
    registrar = FakeRegistrar(refuse_unregister=True)
    pin(memory, registrar).close()
    assert registrar.calls.count("unregister") == 4
    assert len(caplog.records) == 4


def test_an_error_while_giving_free_does_not_keep_the_rest(memory: memoryview) -> None:
    registrar = FakeRegistrar(raise_unregister=True)
    pinned = pin(memory, registrar)
    with pytest.raises(RuntimeError, match="CUDA is gone"):
        pinned.close()
    assert registrar.pieces == {}
    pinned.close()


def test_memory_cannot_go_before_it_is_given_free() -> None:
    mapped = mmap.mmap(-1, 4 * PAGE)
    with memoryview(mapped) as view:
        pinned = pin(view, FakeRegistrar())
    with pytest.raises(BufferError):
        mapped.close()
    pinned.close()
    mapped.close()


@pytest.mark.parametrize("skip", [0, 100])
@pytest.mark.parametrize("num_pieces", [0, 2, 100])
def test_a_copy_is_cut_where_pieces_end(
    skip: int, num_pieces: int, memory: memoryview
) -> None:
    registrar = FakeRegistrar(refuse_after=num_pieces)
    with memory[skip:] as part, pin(part, registrar, chunk_bytes=3 * PAGE) as pinned:
        start = min(registrar.pieces, default=0) - (PAGE - skip if skip else 0)
        for offset, nbytes in [(0, len(part)), (50, 7 * PAGE), (5 * PAGE + 1, 3)]:
            found = list(pinned.cut(offset, nbytes))
            assert sum(length for _, length, _ in found) == nbytes
            position = offset
            for where, length, is_pinned in found:
                assert where == position
                position += length
                within = [
                    address - start <= where and where + length <= address - start + n
                    for address, n in registrar.pieces.items()
                ]
                beside = [
                    where + length <= address - start or address - start + n <= where
                    for address, n in registrar.pieces.items()
                ]
                assert any(within) if is_pinned else all(beside)


@pytest.mark.parametrize("device", [pytest.param(NAME, marks=GPU)])
def test_a_runtime_pins_and_forgets_its_refusals(
    device: str, memory: memoryview
) -> None:
    registrar = registrar_of(module_of(device))
    assert registrar is not None
    with pin(memory, registrar) as pinned:
        assert pinned.fallback is None
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        assert whole.is_pinned()
        with pin(memory, registrar) as again:  # it refuses to do it twice
            assert again.pinned_bytes == 0
            assert again.fallback is not None
        on_gpu = torch.empty_like(whole, device=device)
        for offset, nbytes, _ in pinned.cut(0, len(memory)):
            part = slice(offset, offset + nbytes)
            on_gpu[part].copy_(whole[part], non_blocking=True)
        assert torch.equal(on_gpu.cpu(), whole)  # raises what was not forgotten
    assert not whole.is_pinned()
    del whole
