"""A server's views beside gRPC: metrics for Prometheus, and the status page."""

from __future__ import annotations

import logging

from topq_dist.ps.security.address import Address
from topq_dist.ps.server.coordinator import Coordinator
from topq_dist.ps.server.page.http_server import PageServer
from topq_dist.ps.server.run_metrics import RunMetrics
from topq_dist.ps.server.view_addresses import view_address
from topq_dist.telemetry.prometheus import MetricsServer, serve_metrics

_log = logging.getLogger(__name__)


class Views:
    """The HTTP servers that a configuration asks for; `urls` by option, as they are bound.

    Raises OSError for an address that cannot be had.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self.urls: dict[str, str] = {}
        self._servers: list[MetricsServer | PageServer] = []
        metrics, http = coordinator.serving.metrics, coordinator.serving.http
        try:
            if metrics is not None:
                at = view_address("metrics", metrics)
                self._add("metrics", at, "/metrics", _metrics_server(coordinator, at))
            if http is not None:
                at = view_address("http", http)
                self._add("http", at, "/", PageServer(coordinator, at.host, at.port))
        except BaseException:
            self.close()
            raise

    def _add(self, name: str, at: Address, path: str, server: MetricsServer | PageServer) -> None:
        self._servers.append(server)
        self.urls[name] = f"http://{at.with_port(server.address[1])}{path}"
        if not at.is_loopback:
            _log.warning(
                "%s at %s is served in the clear: whoever reaches it can read how the run is doing,"
                " and its workers' names",
                name,
                self.urls[name],
            )

    def close(self) -> None:
        """End them."""
        while self._servers:
            self._servers.pop().close()


def _metrics_server(coordinator: Coordinator, at: Address) -> MetricsServer:
    try:
        return serve_metrics(RunMetrics(coordinator), at.host, at.port)
    except OSError as error:
        raise OSError(f"metrics at {at}: {error}") from error
