"""Figures of a worker for who looks on: its own metrics, and what a server asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from topq_dist.compress.residual import ResidualUpdate
from topq_dist.compress.unsent import UnsentWatch
from topq_dist.ps.client.server_client import ServerClient
from topq_dist.telemetry.readings import Reading, rank_readings
from topq_dist.telemetry.stats import Meter
from topq_dist.v1 import parameter_server_pb2 as pb


class LookedOn:
    """The age and size of residuals, once somebody looks on, and the loss last reported."""

    def __init__(self, clients: Sequence[ServerClient]) -> None:
        self._clients = clients
        self._watch: UnsentWatch | None = None
        self._loss: float | None = None

    def observe(self) -> None:
        """Measure from the next step on; a second call does nothing."""
        self._watch = self._watch or UnsentWatch()

    def readings(self, meter: Meter) -> list[Reading]:
        """Return what metrics stand at now; from any thread."""
        unsent = None if self._watch is None else self._watch.reading
        return rank_readings(meter, unsent, "server")

    @property
    def asked(self) -> bool:
        """Whether somebody looks on at a server."""
        return any(client.takes_report for client in self._clients)

    def report(self, loss: float | Tensor) -> None:
        """Take the loss that servers are to show, where one asks."""
        if self.asked:
            self._loss = float(loss.detach() if isinstance(loss, Tensor) else loss)

    def report_returned(self, loss: Any) -> None:
        """Take what a closure has returned, where that is a loss."""
        if isinstance(loss, float) or (isinstance(loss, Tensor) and loss.numel() == 1):
            self.report(loss)

    def compressed(self, updates: Sequence[ResidualUpdate | None]) -> None:
        """Measure a step before the residuals are updated, and make the servers' reports."""
        if self._watch is None:
            return
        for update in updates:
            self._watch.compressed(update)
        reading = self._watch.reading
        report = pb.WorkerReport(
            loss=self._loss,
            residual_ratio=reading.residual_ratio,
            oldest_unsent_steps=reading.oldest_steps,
            residual_growing_steps=reading.growing_steps,
        )
        for client in self._clients:
            client.tell(report)

    def applied(self, updates: Sequence[ResidualUpdate]) -> None:
        """Measure a step once the residuals are updated."""
        if self._watch is not None:
            self._watch.applied(updates)
