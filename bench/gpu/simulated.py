"""A plugin of pytest: its import makes the simulated GPU torch's accelerator, so that
the tests that need a GPU run on it."""

from gpu.device import open_device

open_device(is_dry=True)
