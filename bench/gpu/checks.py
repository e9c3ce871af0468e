"""Runs the tests that need a GPU, file by file. If one hangs or cannot be imported,
only its own results are lost.

Takes at most 100 seconds; needs a GPU, pytest and hypothesis.
"""

import importlib.util
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu.common import Part, lacking

ROOT = Path(__file__).resolve().parents[2]
_TEST_SECONDS = 45
_MARKED = re.compile(r"pytest\.mark\.gpu\b|marks=GPU\b")
_FEW = "computes_as_before or pins or is_filled or (same_tokens and llama and disk)"
"""The tests of a dry run, by their names."""


def files() -> list[Path]:
    """The test files with a test that is marked `gpu`, the shortest first."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [path for path in paths if _MARKED.search(path.read_text())]
    return sorted(found, key=lambda path: path.stat().st_size)


def run(part: Part, paths: list[Path]) -> dict[str, Any]:
    xml, log = (part.work / f"{paths[0].stem}.{kind}" for kind in ("xml", "log"))
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "--tb=short"]
    # Warnings of other libraries on an unknown computer are no failures of Penstock.
    command += ["-p", "no:cacheprovider", "-W", "default", f"--junitxml={xml}"]
    command += ["-o", f"faulthandler_timeout={_TEST_SECONDS}"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command.append(f"--timeout={_TEST_SECONDS}")
    if part.is_dry:
        command += ["-k", _FEW]
        if part.has_gpu:
            command += ["-p", "gpu.simulated"]
    with log.open("w") as output:
        try:
            ended = subprocess.run(
                [*command, *map(str, paths)],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=max(part.seconds_left - 4, 1),
            )
            why = f"pytest ended with {ended.returncode}"
        except subprocess.TimeoutExpired:
            why = "no time left"
    text = log.read_text(errors="replace")
    print(text[-20_000:], flush=True)
    if xml.exists():
        return _read(xml)
    passed = text.count(" PASSED")
    tail = " | ".join(text.strip().splitlines()[-8:])
    return {"error": f"{why}, after {passed} tests that passed: {tail}"}


def _read(xml: Path) -> dict[str, Any]:
    cases = list(ElementTree.parse(xml).getroot().iter("testcase"))
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for case in cases:
        name = case.get("name", "?")
        for problem in (*case.findall("failure"), *case.findall("error")):
            failed[name] = (problem.get("message") or "")[:400]
        for skip in case.findall("skipped"):
            skipped[name] = (skip.get("message") or "")[:200]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": failed,
        "skipped": skipped,
    }


def _lacks(part: Part, path: Path) -> bool:
    """Whether a package is missing that the file needs; then it is noted."""
    reason = lacking() if "import penstock\n" in path.read_text() else None
    if reason is not None:
        part.put(**{path.stem: reason})
    return reason is not None


def main() -> None:
    part = Part("tests", __doc__)
    there = [path for path in files() if not _lacks(part, path)]
    # Each file by itself, so that one that cannot be imported stops no other.
    groups = {"every file": there} if part.is_dry else {p.stem: [p] for p in there}
    found = {
        name: part.attempt(name, partial(run, part, paths))
        for name, paths in groups.items()
    }
    good = [result for result in found.values() if result and "error" not in result]
    num_failed = sum(len(result["failed"]) for result in good)
    part.put(
        num_passed=sum(result["passed"] for result in good),
        num_failed=num_failed,
        num_skipped=sum(len(result["skipped"]) for result in good),
    )
    if num_failed or len(good) < len(found):
        names = [name for result in good for name in result["failed"]]
        broken = [name for name, result in found.items() if result not in good]
        sys.exit(f"failed: {', '.join(names)}; could not be run: {broken}")


if __name__ == "__main__":
    main()
