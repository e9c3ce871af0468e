"""Writes the figures of a job to a Prometheus text file, for the textfile collector of
node_exporter."""

from pathlib import Path
from typing import Any

from ...io.errors import OutputError, UsageError
from .samples import Window


class MetricsFile:
    """Writes `path` (FILE.prom) anew each time it is called, as a whole.

    Raises UsageError if the package prometheus-client is missing or the name does not
    end in .prom, and OutputError if the file cannot be written.
    """

    def __init__(self, path: Path, labels: dict[str, str]) -> None:
        if path.suffix != ".prom":
            raise UsageError(
                f"--metrics {path}: node_exporter reads files whose name ends in .prom"
            )
        try:
            import prometheus_client
            from prometheus_client import metrics_core
        except ImportError as error:
            raise UsageError(
                "--metrics needs the package prometheus-client: pip install "
                "'penstock[metrics]'"
            ) from error
        self._path = path
        self._labels = labels
        self._write = prometheus_client.write_to_textfile
        self._families: Any = metrics_core
        # A registry of its own: the default one is shared by the whole process.
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(self)
        self._window: Window | None = None

    def __call__(self, window: Window) -> None:
        self._window = window
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write(str(self._path), self._registry)
        except OSError as error:
            raise OutputError(
                f"cannot write {self._path}: {error.strerror or error}"
            ) from error

    def collect(self) -> list[Any]:
        """The metric families; prometheus_client calls this."""
        if self._window is None:
            return []
        now, names = self._window.now, list(self._labels)
        families, values = self._families, list(self._labels.values())

        def one(kind: str, name: str, text: str, value: float) -> Any:
            family = getattr(families, f"{kind}MetricFamily")(
                f"penstock_{name}", text, labels=names
            )
            family.add_metric(values, value)
            return family

        read = families.CounterMetricFamily(
            "penstock_read_bytes", "Bytes read from each tier.", labels=[*names, "tier"]
        )
        for tier, nbytes in now.bytes_read.items():
            read.add_metric([*values, tier], nbytes)
        found = [
            one("Gauge", "job_seconds", "Seconds since the job began.", now.seconds),
            one(
                "Gauge",
                "rows_done",
                "Rows done, with fractions for those in flight.",
                now.rows,
            ),
            one(
                "Counter",
                "tokens",
                "Tokens through the model; in generation, tokens made by it.",
                now.tokens,
            ),
            one("Counter", "passes", "Passes over the weights.", now.passes),
            one(
                "Counter",
                "wait_seconds",
                "Seconds that computing waited for weights.",
                now.wait_seconds,
            ),
            one(
                "Counter",
                "compute_seconds",
                "Seconds in the model's own code.",
                now.compute_seconds,
            ),
            one(
                "Gauge",
                "resident_memory_bytes",
                "Bytes of memory of this process.",
                now.resident_bytes,
            ),
            read,
        ]
        if now.num_ranks > 1:
            for kind, name, text, value in (
                ("Gauge", "ranks", "Ranks that share the model.", now.num_ranks),
                (
                    "Counter",
                    "rank_wait_seconds",
                    "Seconds that the first rank waited for others.",
                    now.rank_wait_seconds,
                ),
                (
                    "Counter",
                    "rank_sent_bytes",
                    "Bytes of hidden states that the first rank sent to others.",
                    now.rank_bytes_sent,
                ),
            ):
                found.append(one(kind, name, text, value))
        if now.num_rows is not None:
            found.append(one("Gauge", "rows", "Rows of the whole job.", now.num_rows))
        if now.device_bytes is not None:
            text = "Bytes of GPU memory in use."
            found.append(one("Gauge", "device_memory_bytes", text, now.device_bytes))
        return found
