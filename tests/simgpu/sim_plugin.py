"""Lets torch load the simulated GPU by itself in other processes: in workers that are
spawned, and in commands.

torch calls the entry points of the group `torch.backends` when it is imported. A folder
on the path declares one.
"""

from __future__ import annotations

import os

import sim_build

_FILES = {
    "METADATA": "Metadata-Version: 2.1\nName: penstock-simgpu\nVersion: 0\n",
    "entry_points.txt": "[torch.backends]\nsimgpu = sim_device:start\n",
}


def paths() -> list[str]:
    """What has to be on the path of a process that shall have the simulated GPU."""
    folder = sim_build.CACHE / "plugin"
    info = folder / "penstock_simgpu-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    for name, text in _FILES.items():
        if not (info / name).exists():
            part = info / f"{name}.{os.getpid()}"
            part.write_text(text)
            part.replace(info / name)
    return [str(folder), str(sim_build.HERE)]


def environment() -> dict[str, str]:
    """Variables for processes that shall have the simulated GPU."""
    before = [path for path in [os.environ.get("PYTHONPATH", "")] if path]
    return {"PYTHONPATH": os.pathsep.join([*paths(), *before])}
