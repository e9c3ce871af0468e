"""Runs each test that is marked `simgpu` in a process of its own, and reports it here.

The simulated GPU is torch's accelerator for as long as a process lives, and host code
that reads its memory dies: neither may happen to other tests. The process is forked
from one that has imported torch already (forked_python.py) and runs pytest with the
one test; its fixtures are set up there only.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

import forked_python
import sim_build
from sim_device import SimGpu, start

_REPORTS = "PENSTOCK_SIMGPU_REPORTS"
"""In the environment of a child: the file that reports go to."""
_CODE = """
import gc; gc.freeze()  # what was imported before need not be walked
import atexit, os, sys
import pytest
code = pytest.main(sys.argv[1:])
sys.stdout.flush()
atexit._run_exitfuncs()
os._exit(code)
"""


@pytest.fixture
def simgpu() -> Iterator[SimGpu]:
    """The simulated GPU of this process. A kernel that has failed fails the test."""
    device = start()
    yield device
    error = device.take_error()
    assert not error, error


@functools.cache
def _missing() -> str:
    """Why there is no simulated GPU here; "" if there is one."""
    try:
        sim_build.compiled()
    except sim_build.NoCompilerError as error:
        return str(error)
    return ""


def _run(item: pytest.Item) -> list[pytest.TestReport]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reports"
        path.touch()
        _, _, name = item.nodeid.partition("::")
        plain = ["-q", "--tb=short", "-p", "no:cacheprovider"]
        if item.config.getoption("--whole"):
            plain.append("--whole")
        done = forked_python.run(
            *("-c", _CODE, f"{item.path}::{name}", *plain),
            f"--rootdir={item.config.rootpath}",
            env={_REPORTS: str(path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            first=functools.partial(os.chdir, item.config.rootpath),
        )
        lines = path.read_text(encoding="utf-8").splitlines()
    hook = item.config.hook.pytest_report_from_serializable
    found = [hook(config=item.config, data=json.loads(line)) for line in lines]
    for report in found:
        if isinstance(report.longrepr, list):  # JSON has no tuples; skips need them
            report.longrepr = tuple(report.longrepr)
    if not found or found[-1].when != "teardown":
        text = f"its process ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        found.append(_report(item, "failed", text))
    return found


def _report(
    item: pytest.Item,
    outcome: Literal["failed", "skipped"],
    text: str | tuple[str, int, str],
) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, {}, outcome, text, "call")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> bool | None:
    if _REPORTS in os.environ or item.get_closest_marker("simgpu") is None:
        return None
    try:
        why = _missing()
        if why:
            reports = [_report(item, "skipped", (str(item.path), 0, f"Skipped: {why}"))]
        else:
            reports = _run(item)
    except RuntimeError as error:  # it does not compile
        reports = [_report(item, "failed", str(error))]
    where = {"nodeid": item.nodeid, "location": item.location}
    item.ihook.pytest_runtest_logstart(**where)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(**where)
    item.session._setupstate.teardown_exact(nextitem)
    return True


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the child: notes the report for the process that waits for it."""
    if path := os.environ.get(_REPORTS):
        data = report._to_json()
        data["$report_type"] = "TestReport"
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{json.dumps(data)}\n")
