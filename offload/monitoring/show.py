"""Formats numbers for people, and the tables that show them."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from ...io.errors import readable
from ...io.tier import Tier

_TAKEN_SHOWS = 0.05


def human_bytes(nbytes: float) -> str:
    """1536 becomes "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def human_rate(bytes_per_second: float) -> str:
    """1.21e9 becomes "1.21 GB/s", 4e5 becomes "0.4 MB/s"."""
    if bytes_per_second >= 1e8:
        return f"{bytes_per_second / 1e9:.2f} GB/s"
    return f"{bytes_per_second / 1e6:.1f} MB/s"


def human_seconds(seconds: float) -> str:
    """95 becomes "1:35", 4 becomes "4.0 s", 7322 becomes "2:02:02"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _how(plan: dict[str, Any]) -> str:
    """A remark on a prediction that was made from quick estimates."""
    is_quick = str(plan.get("predicted_by", "")).startswith("quick estimate")
    return " (quick estimate)" if is_quick else ""


def report_table(report: dict[str, Any], title: str) -> Table:
    """A table of the report's main figures, and what bound the run."""
    table = Table(title=_cell(title), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    failed = f" ({report['rows_failed']} failed)" if report["rows_failed"] else ""
    weights = report["bytes_by_tier"]
    table.add_row("rows", f"{report['rows']:,}{failed}")
    if "output_tokens" in report:
        table.add_row("prompt tokens", f"{report['prompt_tokens']:,}")
        table.add_row("output tokens", f"{report['output_tokens']:,}")
        rate = report["output_tokens_per_second"]
        table.add_row("output tokens/s", f"{rate:,.1f}")
    else:
        table.add_row("tokens", f"{report['tokens']:,}")
    table.add_row("tokens/s", f"{report['tokens_per_second']:,.1f}")
    plan = report["plan"]
    if "predicted_tokens_per_second" in plan:
        rate, bound = plan["predicted_tokens_per_second"], plan["predicted_bound_by"]
        table.add_row("  predicted", f"{rate:,.1f}, bound by {bound}{_how(plan)}")
    elif "note" in plan:
        table.add_row("  predicted", _cell(plan["note"]))
    table.add_row("time", f"{report['seconds']:.1f} s + {report['load_seconds']:.1f} s")
    table.add_row("weights", human_bytes(report["model_bytes"]))
    table.add_row("  streamed", human_bytes(weights[Tier.DISK]))
    table.add_row("  resident", human_bytes(weights[Tier.DEVICE]))
    if weights[Tier.HOST]:
        table.add_row("  in host memory", human_bytes(weights[Tier.HOST]))
    table.add_row("passes", f"{report['passes']}")
    table.add_row("bytes read", human_bytes(report["bytes_read"][Tier.DISK]))
    if touched := report.get("expert_bytes_touched", 0):
        loaded = human_bytes(report["expert_bytes_loaded"])
        table.add_row("experts used", f"{human_bytes(touched)}, {loaded} loaded")
    if avoided := report.get("host_expert_bytes", 0):
        calls = f"{report['host_expert_calls']:,}"
        table.add_row(
            "experts on the CPU", f"{calls} calls, {human_bytes(avoided)} not loaded"
        )
    table.add_row("working set", human_bytes(report["peak_device_bytes"]))
    table.add_row("peak memory", human_bytes(report["peak_host_bytes"]))
    table.add_row("waited for weights", f"{report['wait_seconds']:.2f} s")
    if waited := report["kv"]["wait_seconds"]:
        table.add_row("  for keys and values", f"{waited:.2f} s")
    if (taken := report["cpu_taken_elsewhere"]) > _TAKEN_SHOWS:
        table.add_row("CPU taken by others", f"{taken:.0%}")
    table.add_row("bound by", report["bound_by"])
    for advice in report["bound"]["advice"]:
        if advice["setting"] is not None:
            table.add_row("  try", _cell(advice["setting"]))
    for fallback in report["fallbacks"]:
        table.add_row("fallback", _cell(fallback))
    for name, count in report["faults"].items():
        table.add_row("fault", _cell(f"{name} ({count}x)"))
    return table


def _cell(text: str) -> str:
    """`text` as it is: escapes what rich or a terminal would interpret."""
    return escape(readable(text))
