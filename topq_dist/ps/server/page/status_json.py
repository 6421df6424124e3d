"""A run as the status page is told of it: numbers now, and what its newest versions were like."""

from __future__ import annotations

import json
import secrets
from itertools import islice
from typing import Any

from topq_dist.ps.server.coordinator import Coordinator
from topq_dist.ps.server.run_counters import VersionPoint, WorkerCounts
from topq_dist.ps.server.status import WorkerView

# a page draws no more
_MOST_POINTS = 2048


class StatusJson:
    """Makes the page's JSON; from any thread.

    instance: tells this server's process from others, after which versions may come once more.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self.instance = secrets.token_hex(8)

    def text(self, *, after: int, instance: str) -> str:
        """Return the JSON; with `instance` this one, without versions up to `after`."""
        coordinator = self._coordinator
        counters, snapshotter = coordinator.counted()
        with coordinator.locked():
            status = coordinator.status()
            workers = [_of_worker(one, counters.worker(one.worker)) for one in status.workers]
            newest = list(islice(reversed(counters.points), _MOST_POINTS))
            slow_rounds = counters.slow_rounds
            overdue_s = snapshotter.overdue_s()
        known = after if instance == self.instance else -1
        training, totals = coordinator.training, coordinator.totals
        return json.dumps(
            {
                "instance": self.instance,
                "run": status.run,
                "mode": training.mode,
                "downlink": training.downlink,
                "inner_opt": training.inner_opt,
                "momentum_text": coordinator.momentum_text,
                "numel": status.numel,
                "version": status.point.version,
                "durable_version": status.durable_version,
                "snapshot_bytes": snapshotter.size_bytes,
                "snapshot_overdue_s": overdue_s,
                "uptime_s": status.uptime_s,
                "round_workers": status.round_workers,
                "slow_rounds": slow_rounds,
                "received_bytes": status.received_bytes,
                "sent_bytes": status.sent_bytes,
                "received_dense_bytes": totals.received_dense_bytes,
                "sent_dense_bytes": totals.sent_dense_bytes,
                "refused": dict(sorted(status.refused.items())),
                "workers": workers,
                "points": [_of_point(one) for one in reversed(newest) if one.version > known],
            },
            allow_nan=False,
        )


def _of_worker(view: WorkerView, counts: WorkerCounts) -> dict[str, Any]:
    return {
        "worker": view.worker,
        "version": view.version,
        "lag": view.lag,
        "pushes": view.sequence,
        "lease_left_s": view.lease_left_s,
        "waiting": view.waiting,
        "received_bytes": view.received_bytes,
        "sent_bytes": view.sent_bytes,
        "waited_s": counts.waited_s,
        "late": counts.late,
        "late_in_a_row": counts.late_in_a_row,
        "loss": counts.report.loss,
        "residual_ratio": counts.report.residual_ratio,
        "oldest_unsent_steps": counts.report.oldest_unsent_steps,
    }


def _of_point(point: VersionPoint) -> list[float | None]:
    return [
        point.version,
        point.at_s,
        point.round_s,
        point.workers,
        point.up_bytes,
        point.loss,
        point.residual_ratio,
    ]
