"""Formats the results of the suite as a page of Markdown. Uses only the standard
library."""

from collections.abc import Iterator, Mapping
from typing import Any

HEADLINES = (
    ("pinned host to device, best", "links", "pinned_h2d_bytes_per_second", None),
    ("the same from Penstock's own pinned memory", "links", "registered_h2d", None),
    ("bf16 products, best", "links", "bf16_matmul_flops_per_second", None),
    ("tests passed", "tests", "num_passed", None),
    ("tests failed", "tests", "num_failed", "0"),
    ("link alone, of a bare loop of copies", "streaming", "alone.of_plain", "0.97"),
    (
        "streamed blocks equal to resident ones, bit for bit",
        "streaming",
        "bit_identical",
        "true",
    ),
    (
        "few tokens: of max(compute, transfer)",
        "streaming",
        "in_flight_1.of_max_of_compute_and_transfer",
        "0.97",
    ),
    (
        "many tokens: of max(compute, transfer)",
        "streaming",
        "in_flight_8.of_max_of_compute_and_transfer",
        "0.97",
    ),
    (
        "many tokens: of the rate of the products",
        "streaming",
        "in_flight_8.of_matmul_rate",
        "0.60",
    ),
    (
        "the same through penstock.sweep",
        "api",
        "in_flight_8.of_matmul_rate",
        "0.60",
    ),
    ("penstock.sweep, tokens/s", "api", "in_flight_8.tokens_per_second", None),
    ("resident, tokens/s", "rivals", "resident.tokens_per_second", None),
    (
        "accelerate, one micro-batch after the other, tokens/s",
        "rivals",
        "accelerate.tokens_per_second",
        "a tenth of penstock",
    ),
    (
        "accelerate, all as one batch, tokens/s",
        "rivals",
        "accelerate.as_one_batch_tokens_per_second",
        None,
    ),
    ("waits of the main thread (blocks)", "tracing", "rig.main_thread_waits", "0"),
    ("waits of the main thread (sweep)", "tracing", "sweep.main_thread_waits", "0"),
)

_UNITS = (
    ("_bytes_per_second", 1e9, "GB/s"),
    ("_flops_per_second", 1e12, "TFLOP/s"),
    ("flops_per_second", 1e12, "TFLOP/s"),
    ("bytes_per_second", 1e9, "GB/s"),
    ("_bytes", 1e9, "GB"),
    ("bytes_moved_per_pass", 1e9, "GB"),
)


def markdown(suite: Mapping[str, Any]) -> str:
    """The whole card."""
    return "\n".join(
        [
            f"# Penstock on {_name(suite)}",
            "",
            suite["prerequisites"],
            f"{suite['seconds']:.0f} s in all, {suite['date']}"
            + (
                ", a dry run: the figures mean nothing." if suite["is_dry_run"] else "."
            ),
            "",
            "| | measured | target |",
            "| --- | ---: | ---: |",
            *_headlines(suite["parts"]),
            "",
            "| part | | seconds |",
            "| --- | --- | ---: |",
            *(
                f"| {name} | {part['status']} | {part['seconds']:.0f} |"
                for name, part in suite["parts"].items()
            ),
            *_failures(suite["parts"]),
            *_details(suite["parts"]),
            "",
        ]
    )


def _name(suite: Mapping[str, Any]) -> str:
    machine = suite["parts"].get("machine", {}).get("figures", {})
    gpu = machine.get("gpu")
    return str(gpu["name"]) if isinstance(gpu, dict) and "name" in gpu else "no GPU"


def _headlines(parts: Mapping[str, Any]) -> Iterator[str]:
    for label, part, path, target in HEADLINES:
        value: Any = parts.get(part, {}).get("figures", {})
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if path == "registered_h2d" and isinstance(value, dict):
            value = value.get("bytes_per_second")
        if isinstance(value, dict) and "error" not in value:
            value = max((v for v in value.values() if _is_number(v)), default=None)
        unit_of = "bytes_per_second" if path == "registered_h2d" else path
        shown = (
            "-" if value is None or isinstance(value, dict) else _show(unit_of, value)
        )
        yield f"| {label} | {shown} | {target or ''} |"


def _failures(parts: Mapping[str, Any]) -> Iterator[str]:
    for name, part in parts.items():
        if part["stderr_tail"]:
            yield from ("", f"## {name}: {part['status']}", "", "```")
            yield from part["stderr_tail"]
            yield "```"


def _details(parts: Mapping[str, Any]) -> Iterator[str]:
    for name, part in parts.items():
        if part["figures"]:
            yield from ("", f"## {name}", "")
            yield from (
                f"- {path}: {_show(path, value)}"
                for path, value in _flat("", part["figures"])
            )


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)


def _show(path: str, value: Any) -> str:
    if not _is_number(value):
        return str(value).lower() if isinstance(value, bool) else str(value)
    for key in reversed(path.split(".")):
        for ending, scale, unit in _UNITS:
            if key.endswith(ending):
                return f"{value / scale:.4g} {unit}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
