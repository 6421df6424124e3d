"""The story of a run in log lines, as an operator reads it: progress, waits, who has gone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from topq_dist.ps.server.coordinator import Coordinator
from topq_dist.ps.server.status import Status

_log = logging.getLogger(__name__)
_PROGRESS_EVERY_S = 10.0
_WAITS_S = 5.0


class RunLog:
    """Tells of a run at level INFO, when `look` is called about every second.

    clock: seconds.
    """

    def __init__(
        self, coordinator: Coordinator, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._coordinator = coordinator
        self._clock = clock
        self._told_s = clock()
        self._told_version = coordinator.status().point.version
        self._live: frozenset[str] = frozenset()
        # since when the version under way has been waited for, and whether that was told
        self._version = -1
        self._since_s = clock()
        self._told_wait = False

    def look(self) -> None:
        """Look at the run, and tell what is new."""
        if not _log.isEnabledFor(logging.INFO):
            return
        status, now_s = self._coordinator.status(), self._clock()
        self._tell_of_workers(status)
        self._tell_of_wait(status, now_s)
        self._tell_of_progress(status, now_s)

    def _tell_of_workers(self, status: Status) -> None:
        views = {one.worker: one for one in status.workers}
        live = frozenset(name for name, one in views.items() if one.lease_left_s > 0)
        for worker in sorted((self._live - live) & views.keys()):
            _log.info(
                "worker %s was not heard of for a lease: the run goes on without it",
                worker,
                extra={"worker": worker, "version": status.point.version},
            )
        self._live = live

    def _tell_of_wait(self, status: Status, now_s: float) -> None:
        version = status.point.version
        there = sum(one.waiting for one in status.workers)
        if version != self._version or not there:
            if self._told_wait:
                _log.info(
                    "version %d is there after %.0f s",
                    version,
                    now_s - self._since_s,
                    extra={"version": version, "waited_s": now_s - self._since_s},
                )
            self._version, self._since_s, self._told_wait = version, now_s, False
            return
        if self._told_wait or now_s - self._since_s < _WAITS_S or not status.round_workers:
            return
        self._told_wait = True
        missing = [
            one.worker for one in status.workers if one.worker in self._live and not one.waiting
        ]
        _log.info(
            "version %d has waited for %.0f s: %d of %d pushes are there, missing: %s",
            version + 1,
            now_s - self._since_s,
            there,
            status.round_workers,
            ", ".join(missing) or "workers that have not joined",
            extra={"version": version + 1, "missing": missing},
        )

    def _tell_of_progress(self, status: Status, now_s: float) -> None:
        version, took_s = status.point.version, now_s - self._told_s
        made = version - self._told_version
        if took_s < _PROGRESS_EVERY_S:
            return
        self._told_s, self._told_version = now_s, version
        if made <= 0:
            return
        _log.info(
            "version %d, durable %d, %.2f a second, %d workers, refused: %s",
            version,
            status.durable_version,
            made / took_s,
            len(self._live),
            ", ".join(f"{reason} {n}" for reason, n in sorted(status.refused.items()) if n)
            or "nothing",
            extra={
                "version": version,
                "durable_version": status.durable_version,
                "versions_per_s": made / took_s,
                "workers": len(self._live),
            },
        )
