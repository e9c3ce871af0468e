"""Freed activations go back to the system when there are many, and not before."""

import ctypes

import pytest

import forked_python

has_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) is not None
only_glibc = pytest.mark.skipif(not has_trim, reason="only glibc's heap is trimmed")


TRIMMED = """
import sys, psutil
from penstock.offload.monitoring.heap import Heap

process = psutil.Process()
heap = Heap(slack_bytes=int(sys.argv[1]) << 20)
blocks = [bytes(60_000) for _ in range(2_000)]  # 114 MiB, too small to be mapped
kept = [bytes(60_000)]  # above them, so that freeing alone gives nothing back
full = process.memory_info().rss
blocks.clear()
heap.trim()
print(full - process.memory_info().rss)
"""


def printed(code: str, *arguments: object) -> int:
    """The number that `code` prints, in a process with a heap of its own."""
    done = forked_python.run("-c", code, *arguments)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@only_glibc
@pytest.mark.parametrize("slack_mib", [16, 1024])
def test_heap_is_trimmed_once_the_slack_is_exceeded(slack_mib: int) -> None:
    given_back = printed(TRIMMED, slack_mib)
    assert (given_back > 80 << 20) == (slack_mib == 16)


CODE = """
import resource, sys, torch
from penstock.offload.monitoring.heap import Heap

heap = Heap() if sys.argv[1] == "kept" else None
size = int(sys.argv[2]) << 18  # float32
for num in range(20):  # aligned memory fits where there was a little more
    if num == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, mib: int) -> float:
    """Pages faulted in by ten tensors of `mib` MiB, one after the other, over the pages
    of one."""
    return printed(CODE, how, mib) / (mib * 256)


@only_glibc
def test_large_activations_take_the_memory_of_those_that_were_freed() -> None:
    assert faults("kept", 48) < 2
    assert faults("as it is", 48) > 8
    assert faults("kept", 96) > 8  # they would leave holes


CLOSED = """
import gc, psutil, torch, penstock

process = psutil.Process()
net = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
penstock.wrap(net, {"device_memory": "1MiB"})
blocks = [bytes(60_000) for _ in range(2_000)]
kept = [bytes(60_000)]
net(torch.ones(1, 64))
full = process.memory_info().rss
blocks.clear()
END
print(full - process.memory_info().rss)
"""


@only_glibc
@pytest.mark.parametrize("end", ["penstock.unwrap(net)", "del net; gc.collect()"])
def test_a_model_that_ends_gives_freed_memory_back(end: str) -> None:
    assert printed(CLOSED.replace("END", end)) > 80 << 20
