"""The accelerator that tests marked `gpu` run on: the first one that torch finds."""

from __future__ import annotations

import pytest

from penstock.io.devices.accelerators import accelerators

FOUND = accelerators()
NAME = FOUND[0] if FOUND else "cuda:0"
GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not FOUND, reason="torch finds no accelerator"),
)
