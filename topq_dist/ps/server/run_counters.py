"""Counts of rounds, pushes and workers, for a server's metrics and status page.

The coordinator's lock guards it, but for what comes in on the threads of calls.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from topq_dist.telemetry.readings import Histogram

# a slow round is one of so many times the median of those before it
_SLOW = 3.0
_SLOW_LEAST_S = 0.25
_ROUNDS = 101
_FEW_ROUNDS = 5
_ROUND_BOUNDS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
# of the status page: at one a version, some minutes to hours
_MOST_POINTS = 4096


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """How a worker says that it is doing; None: not known."""

    loss: float | None = None
    residual_ratio: float | None = None
    oldest_unsent_steps: float | None = None
    residual_growing_steps: float | None = None


@dataclass(kw_only=True)
class WorkerCounts:
    """Counts of one worker; late_in_a_row: versions that it has missed since its last."""

    waited_s: float = 0.0
    late: int = 0
    late_in_a_row: int = 0
    late_streaks: int = 0
    report: WorkerReport = field(default_factory=WorkerReport)

    def is_late(self) -> None:
        """Count a version without this worker."""
        self.late += 1
        self.late_in_a_row += 1
        self.late_streaks += self.late_in_a_row == 2


@dataclass(frozen=True, kw_only=True)
class VersionPoint:
    """A version as the status page draws it: numbers of it, or means over its workers.

    at_s: seconds since 1970. up_bytes: a push's, on average. None: nobody has said.
    """

    version: int
    at_s: float
    round_s: float
    workers: int
    up_bytes: float
    loss: float | None
    residual_ratio: float | None


class RunCounters:
    """Counters of a run since the server began; `points` are its newest versions.

    observed: whether workers are to report on themselves.
    """

    def __init__(self, *, observed: bool = False) -> None:
        self.rounds = Histogram(_ROUND_BOUNDS_S)
        self.slow_rounds = 0
        self.step_s = 0.0
        self.pushes: Counter[str] = Counter()
        self.points: deque[VersionPoint] = deque(maxlen=_MOST_POINTS)
        self._durations_s: deque[float] = deque()
        self._ascending_s: list[float] = []
        self._workers: dict[str, WorkerCounts] = {}
        self._adding = threading.Lock()
        self.observed = observed

    def worker(self, worker: str) -> WorkerCounts:
        """Return a worker's counts, which begin at zero."""
        found = self._workers.get(worker)
        if found is None:
            with self._adding:
                found = self._workers.setdefault(worker, WorkerCounts())
        return found

    def keep_only(self, workers: Iterable[str]) -> None:
        """Forget all other workers."""
        wanted = set(workers)
        with self._adding:
            self._workers = {name: one for name, one in self._workers.items() if name in wanted}

    def take_report(self, worker: str, report: WorkerReport) -> None:
        """Note what a worker has reported; numbers that are not finite are not known."""
        numbers = {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in vars(report).items()
        }
        self.worker(worker).report = replace(report, **numbers)

    def version_made(
        self,
        version: int,
        waited_s: Mapping[str, float],
        missing: Iterable[str],
        *,
        step_s: float,
        up_bytes: int,
    ) -> None:
        """Count a version.

        waited_s: of each worker that it is made of, how long its push was there. missing: whose
        lease runs, and who are not among them. step_s: what making it took. up_bytes: of all
        pushes' frames.
        """
        round_s = max(waited_s.values(), default=0.0)
        self._count_round(round_s)
        self.step_s += step_s
        self.pushes["applied"] += len(waited_s)
        for worker, waited in waited_s.items():
            counts = self.worker(worker)
            counts.waited_s += waited
            counts.late_in_a_row = 0
        for worker in missing:
            self.worker(worker).is_late()
        reports = [self.worker(worker).report for worker in waited_s]
        self.points.append(
            VersionPoint(
                version=version,
                at_s=time.time(),
                round_s=round_s,
                workers=len(waited_s),
                up_bytes=up_bytes / max(1, len(waited_s)),
                loss=_mean(one.loss for one in reports),
                residual_ratio=_mean(one.residual_ratio for one in reports),
            )
        )

    def _count_round(self, round_s: float) -> None:
        self.rounds.observe(round_s)
        before = self._ascending_s
        if len(before) >= _FEW_ROUNDS:
            self.slow_rounds += round_s > max(_SLOW * before[len(before) // 2], _SLOW_LEAST_S)
        insort(before, round_s)
        self._durations_s.append(round_s)
        if len(before) > _ROUNDS:
            del before[bisect_left(before, self._durations_s.popleft())]

    def push_refused(self, worker: str, reason: str, *, is_late: bool) -> None:
        """Count a push that was not applied."""
        self.pushes[reason] += 1
        if is_late:
            self.worker(worker).is_late()


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if known else math.nan
    return mean if math.isfinite(mean) else None  # of numbers near the largest, it is not
