"""Freed activations go back to the system when there are many, and not before."""

import ctypes

import psutil
import pytest

from penstock.offload.monitoring.memory import HeapTrimmer

has_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) is not None


@pytest.mark.skipif(not has_trim, reason="only glibc's heap is trimmed")
@pytest.mark.parametrize("slack_mib", [16, 1024])
def test_heap_is_trimmed_once_the_slack_is_exceeded(slack_mib: int) -> None:
    process = psutil.Process()
    trim = HeapTrimmer(slack_bytes=slack_mib << 20)
    blocks = [bytes(60_000) for _ in range(2_000)]  # 114 MiB, too small to be mapped
    kept = [bytes(60_000)]  # above them, so that freeing alone gives nothing back
    full = process.memory_info().rss
    blocks.clear()
    trim()
    given_back = full - process.memory_info().rss
    assert (given_back > 80 << 20) == (slack_mib == 16)
    assert kept
