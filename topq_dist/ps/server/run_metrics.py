"""A server's metrics, read from its coordinator."""

from __future__ import annotations

from collections.abc import Iterator

from topq_dist.ps.server.coordinator import Coordinator
from topq_dist.ps.server.run_counters import WorkerCounts
from topq_dist.ps.server.status import Status, WorkerView
from topq_dist.telemetry import catalog
from topq_dist.telemetry.readings import Reading


class RunMetrics:
    """The metrics of a server; `observe` has workers report on themselves from then on."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def observe(self) -> None:
        """Ask workers that join from now on for what takes them time to measure."""
        self._coordinator.counters.observed = True

    def readings(self) -> list[Reading]:
        """Return what all metrics stand at now; from any thread."""
        coordinator = self._coordinator
        counters, snapshotter = coordinator.counted()
        with coordinator.locked():
            status = coordinator.status()
            counters.keep_only(worker.worker for worker in status.workers)
            readings = [
                counters.rounds.reading(catalog.ROUND_DURATION),
                Reading(catalog.SLOW_ROUNDS, counters.slow_rounds),
                Reading(catalog.STEP_SECONDS, counters.step_s),
                snapshotter.durations.reading(catalog.SNAPSHOT_DURATION),
                Reading(catalog.SNAPSHOT_SIZE, snapshotter.size_bytes),
                Reading(catalog.SNAPSHOT_UNSAVED, snapshotter.unsaved_s()),
                Reading(catalog.SNAPSHOT_OVERDUE, snapshotter.overdue_s()),
            ]
            outcomes = ("applied", "repeated", "stale", "unbelieved_replay", "non_finite")
            readings += [
                Reading(catalog.PUSHES, counters.pushes[outcome], (outcome,))
                for outcome in outcomes
            ]
            for worker in status.workers:
                readings += _of_worker(worker, counters.worker(worker.worker))
        return [*readings, *self._of_run(status)]

    def _of_run(self, status: Status) -> Iterator[Reading]:
        training, totals = self._coordinator.training, self._coordinator.totals
        yield Reading(catalog.RUN, 1.0, (status.run, training.mode, training.downlink))
        yield Reading(catalog.VERSION, status.point.version)
        yield Reading(catalog.DURABLE_VERSION, status.durable_version)
        yield Reading(catalog.PARAMETERS, status.numel)
        yield Reading(catalog.WORKERS, sum(one.lease_left_s > 0 for one in status.workers))
        yield Reading(catalog.BYTES_UP, status.received_bytes)
        yield Reading(catalog.BYTES_DOWN, status.sent_bytes)
        yield Reading(catalog.DENSE_UP, totals.received_dense_bytes)
        yield Reading(catalog.DENSE_DOWN, totals.sent_dense_bytes)
        yield Reading(catalog.DECODE_PUSH_SECONDS, totals.decode_s)
        for reason, count in sorted(status.refused.items()):
            yield Reading(catalog.REFUSED, count, (reason,))


def _of_worker(worker: WorkerView, counts: WorkerCounts) -> Iterator[Reading]:
    name = (worker.worker,)
    yield Reading(catalog.WORKER_LAG, worker.lag, name)
    yield Reading(catalog.WORKER_LEASE, worker.lease_left_s, name)
    yield Reading(catalog.WORKER_WAITS, counts.waited_s, name)
    yield Reading(catalog.WORKER_LATE, counts.late, name)
    yield Reading(catalog.WORKER_LATE_STREAKS, counts.late_streaks, name)
    said = (
        (catalog.WORKER_LOSS, counts.report.loss),
        (catalog.WORKER_RESIDUAL, counts.report.residual_ratio),
        (catalog.WORKER_GROWING, counts.report.residual_growing_steps),
        (catalog.WORKER_UNSENT, counts.report.oldest_unsent_steps),
    )
    for metric, value in said:
        if value is not None:
            yield Reading(metric, value, name)
