"""Metrics for Prometheus, in its text format or in OpenMetrics', over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from wsgiref.simple_server import WSGIServer

from topq_dist.telemetry.readings import Observed, Reading

if TYPE_CHECKING:  # of the extra, and wanted by those who serve
    from prometheus_client import Metric as Family


class MetricsServer:
    """What `serve_metrics` has started; `close` ends it. address: (host, port) as it is bound."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        host, port = server.server_address[:2]
        self.address: tuple[str, int] = (str(host), int(port))

    def close(self) -> None:
        """Serve no more; to close again does nothing."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def serve_metrics(source: Observed, host: str = "127.0.0.1", port: int = 0) -> MetricsServer:
    """Serve a source's metrics at http://HOST:PORT/metrics from a thread of its own.

    source: a TopQState, a ParameterServerOptimizer, or anything else that has `readings` and
        `observe`. port: 0 takes a free one, which the result's `address` says.
    From then on the source also measures what costs time (docs/metrics.md says how much). Raises
    ModuleNotFoundError without the package prometheus-client (the extra "metrics"), TypeError for
    another source and OSError for an address that cannot be had.
    """
    if not (hasattr(source, "readings") and hasattr(source, "observe")):
        raise TypeError(
            f"source is a {type(source).__name__}: expected a TopQState, a "
            "ParameterServerOptimizer, or another with readings() and observe()"
        )
    try:
        from prometheus_client import CollectorRegistry, start_http_server
        from prometheus_client.registry import Collector
    except ModuleNotFoundError as error:
        if error.name != "prometheus_client":
            raise
        raise ModuleNotFoundError(
            "metrics need prometheus-client: pip install 'topq-dist[metrics]'", name=error.name
        ) from None

    class _Source(Collector):
        def collect(self) -> Iterator[Family]:
            return families(source.readings())

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Source())
    server, thread = start_http_server(port, addr=host, registry=registry)
    source.observe()
    return MetricsServer(server, thread)


def families(readings: list[Reading]) -> Iterator[Family]:
    """Yield the families of prometheus-client that these readings make up."""
    from prometheus_client import core

    kinds: dict[str, Any] = {
        "counter": core.CounterMetricFamily,
        "gauge": core.GaugeMetricFamily,
        "histogram": core.HistogramMetricFamily,
        "info": core.InfoMetricFamily,
    }
    made: dict[str, Any] = {}
    for reading in readings:
        metric = reading.metric
        family = made.get(metric.name)
        if family is None:
            labels = () if metric.kind == "info" else metric.labels
            unit = {"unit": metric.unit} if metric.unit else {}
            family = kinds[metric.kind](metric.name, metric.text, labels=labels, **unit)
            made[metric.name] = family
        if metric.kind == "info":
            family.add_metric((), dict(zip(metric.labels, reading.labels, strict=True)))
        elif metric.kind == "histogram":
            buckets = [(core_bound(bound), count) for bound, count in reading.buckets]
            family.add_metric(reading.labels, buckets, reading.value)
        else:
            family.add_metric(reading.labels, reading.value)
    yield from made.values()


def core_bound(bound: float) -> str:
    """Return a bucket's bound as Prometheus spells it."""
    return "+Inf" if bound == float("inf") else repr(bound)
