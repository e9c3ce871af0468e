"""Formats the results of the suite as a page of Markdown. Uses only the standard
library."""

from collections.abc import Iterator, Mapping
from typing import Any

HEADLINES: tuple[tuple[str, str, str, str], ...] = (
    ("pinned host to device, best", "links", "pinned_h2d_bytes_per_second", ""),
    ("device to pinned host, best", "links", "pinned_d2h_bytes_per_second", ""),
    ("pageable host to device, best", "links", "pageable_h2d_bytes_per_second", ""),
    ("device to pageable host, best", "links", "pageable_d2h_bytes_per_second", ""),
    ("both directions at once, sum", "links", "both_ways.sum_bytes_per_second", ""),
    (
        "from Penstock's own pinned memory",
        "links",
        "registered_h2d.bytes_per_second",
        "",
    ),
    ("from another accelerator, best", "links", "from_peer_bytes_per_second", ""),
    ("disk to host, threads", "links", "disk_threads_bytes_per_second", ""),
    (
        "disk to pinned host to device",
        "links",
        "disk_to_device.bytes_per_second",
        "",
    ),
    ("disk to device directly", "links", "gds_bytes_per_second", ""),
    ("bf16 products, best", "links", "bf16_matmul_flops_per_second", ""),
    ("tests passed", "tests", "num_passed", ""),
    ("tests failed", "tests", "num_failed", "0"),
    (
        "streamed blocks equal to resident ones, bit for bit",
        "streaming",
        "bit_identical",
        "true",
    ),
    ("the same from every tier, and of keys and values", "tiers", "all_equal", "true"),
    ("link alone, of a bare loop of copies", "streaming", "alone.of_plain", "0.97"),
    (
        "few tokens: of max(compute, weights / link)",
        "streaming",
        "in_flight_1.of_max_of_compute_and_transfer",
        "0.97",
    ),
    (
        "many tokens: of max(compute, weights / link)",
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
    ("penstock.sweep, tokens/s", "api", "in_flight_8.tokens_per_second", ""),
    ("penstock.sweep, peak of the device", "api", "peak_device_bytes", ""),
    ("resident, tokens/s", "rivals", "resident.tokens_per_second", ""),
    ("resident, peak of the device", "rivals", "resident.peak_device_bytes", ""),
    (
        "copy, then compute (no overlap), tokens/s",
        "rivals",
        "plain.tokens_per_second",
        "",
    ),
    (
        "accelerate, one micro-batch after the other, tokens/s",
        "rivals",
        "accelerate.tokens_per_second",
        "",
    ),
    (
        "accelerate, all as one batch, tokens/s",
        "rivals",
        "accelerate.as_one_batch_tokens_per_second",
        "",
    ),
    ("waits of the main thread (blocks)", "tracing", "rig.main_thread_waits", "0"),
    (
        "waits of the main thread (sweep), for each micro-batch",
        "tracing",
        "sweep.main_thread_waits_each",
        "1 at most",
    ),
    (
        "sweep: seconds that kernels wait for copies",
        "tracing",
        "sweep.kernels_wait_for_copies_seconds",
        "",
    ),
    (
        "sweep: seconds that kernels wait for the host",
        "tracing",
        "sweep.kernels_wait_for_host_seconds",
        "",
    ),
)

_SWEEP = "in_flight_8.tokens_per_second"
RATIOS = (
    ("penstock.sweep, of resident", "resident.tokens_per_second", "0.9"),
    ("penstock.sweep, of copy, then compute", "plain.tokens_per_second", ""),
    (
        "penstock.sweep, of accelerate, one micro-batch after the other",
        "accelerate.tokens_per_second",
        "10",
    ),
    (
        "penstock.sweep, of accelerate, all as one batch",
        "accelerate.as_one_batch_tokens_per_second",
        "",
    ),
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
            f"The device is {suite['device'] or 'not known: no part got so far'}.",
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
        value = _at(parts, part, path)
        shown = "-" if value is None else _show(path, value)
        yield f"| {label} | {shown} | {target} |"
    for label, path, target in RATIOS:
        rates = _rate(parts, "api", _SWEEP), _rate(parts, "rivals", path)
        shown = f"{rates[0] / rates[1]:.3g}" if rates[0] and rates[1] else "-"
        yield f"| {label} | {shown} | {target} |"


def _rate(parts: Mapping[str, Any], part: str, path: str) -> float | None:
    """Tokens and blocks per second: the two may differ in the number of blocks."""
    rate, num = _at(parts, part, path), _at(parts, part, "num_layers")
    return rate * num if _is_number(rate) and _is_number(num) else None


def _at(parts: Mapping[str, Any], part: str, path: str) -> Any:
    """The figure at `path`; of several by size, the greatest; None if there is none."""
    value: Any = parts.get(part, {}).get("figures", {})
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, dict):
        return max((v for v in value.values() if _is_number(v)), default=None)
    return value if isinstance(value, bool) or _is_number(value) else None


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
