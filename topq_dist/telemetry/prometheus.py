"""Metrics for Prometheus, in its text format or in OpenMetrics', over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self

from topq_dist.telemetry.http_server import Answer, HttpServer, Request, refusal
from topq_dist.telemetry.readings import Observed, Reading

if TYPE_CHECKING:  # of the extra, and wanted by those who serve
    from prometheus_client import Metric as Family

_PATH = "/metrics"


class MetricsServer:
    """What `serve_metrics` has started; `close` ends it. address: (host, port) as it is bound."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self.address = server.address

    def close(self) -> None:
        """Serve no more, and hang up; to close again does nothing."""
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve_metrics(source: Observed, host: str = "127.0.0.1", port: int = 0) -> MetricsServer:
    """Serve a source's metrics at http://HOST:PORT/metrics from a thread of its own.

    source: a TopQState, a ParameterServerOptimizer, or anything else that has `readings` and
        `observe`. port: 0 takes a free one, which the result's `address` says.
    On loopback only names of loopback are answered; 64 connections at most are open, and a request
    has ten seconds to be there. From then on the source also measures what costs time
    (docs/metrics.md says how much). Raises ModuleNotFoundError without the package
    prometheus-client (the extra "metrics"), TypeError for another source and OSError for an address
    that cannot be had.
    """
    if not (hasattr(source, "readings") and hasattr(source, "observe")):
        raise TypeError(
            f"source is a {type(source).__name__}: expected a TopQState, a "
            "ParameterServerOptimizer, or another with readings() and observe()"
        )
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder
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

    def respond(request: Request) -> Answer:
        if request.path != _PATH:
            return refusal(HTTPStatus.NOT_FOUND, f"expected {_PATH}")
        encode, kind = choose_encoder(request.accept)
        return Answer(encode(registry), kind)

    server = HttpServer("metrics", host, port, respond)
    source.observe()
    return MetricsServer(server)


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
