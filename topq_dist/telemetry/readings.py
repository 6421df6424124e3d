"""Readings: what a metric stands at. Whoever offers metrics returns a list of them when asked."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from topq_dist.telemetry.catalog import (
    DECODE_SECONDS,
    DENSE_BYTES,
    ENCODE_SECONDS,
    EXCHANGE,
    OLDEST_UNSENT,
    RECEIVED_BYTES,
    RESIDUAL_GROWING,
    RESIDUAL_RATIO,
    SELECT_SECONDS,
    SENT_BYTES,
    STEPS,
    VOID_STEPS,
    WAIT_SECONDS,
    WIRE_BYTES,
    Metric,
)
from topq_dist.telemetry.stats import Meter


@dataclass(frozen=True)
class Reading:
    """A value of a metric: a number, or a histogram's counts as (bound, count up to it) and sum.

    labels: in the order of the metric's. buckets: cumulative, the last bound infinite.
    """

    metric: Metric
    value: float
    labels: tuple[str, ...] = ()
    buckets: tuple[tuple[float, int], ...] = field(default=())


class Observed(Protocol):
    """Whatever offers metrics: a hook's state, a worker's optimizer, a server."""

    def observe(self) -> None:
        """Begin to measure what costs time, because somebody wants to see it."""

    def readings(self) -> list[Reading]:
        """Return what all metrics stand at now; from any thread."""


class Histogram:
    """Counts of observations by upper bounds, and their sum. Not for several threads at once.

    bounds: ascending, the last one short of infinity.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = (*bounds, float("inf"))
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def reading(self, metric: Metric) -> Reading:
        """Return what it stands at."""
        total, buckets = 0, []
        for bound, count in zip(self._bounds, self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return Reading(metric, self._sum, buckets=tuple(buckets))


@dataclass(frozen=True, kw_only=True)
class UnsentReading:
    """What waits in a rank's residuals; see the metrics of these names. None: not measured yet."""

    residual_ratio: float | None = None
    growing_steps: int = 0
    oldest_steps: int | None = None


def joined(readings: Iterable[UnsentReading]) -> UnsentReading:
    """Return what parts of a model come to that are measured apart: the most of each."""
    parts = list(readings)
    ratios = [one.residual_ratio for one in parts if one.residual_ratio is not None]
    ages = [one.oldest_steps for one in parts if one.oldest_steps is not None]
    return UnsentReading(
        residual_ratio=max(ratios, default=None),
        growing_steps=max((one.growing_steps for one in parts), default=0),
        oldest_steps=max(ages, default=None),
    )


def rank_readings(meter: Meter, unsent: UnsentReading | None, exchange: str) -> list[Reading]:
    """Return a rank's readings; unsent: None where nobody has asked for it before."""
    stats = meter.stats
    numbers: Iterable[tuple[Metric, float | None]] = [
        (STEPS, stats.steps),
        (VOID_STEPS, meter.void_steps),
        (SENT_BYTES, stats.sent_bytes),
        (RECEIVED_BYTES, stats.received_bytes),
        (WIRE_BYTES, stats.wire_bytes),
        (DENSE_BYTES, stats.dense_bytes),
        (SELECT_SECONDS, meter.selecting_s),
        (ENCODE_SECONDS, meter.encode_s),
        (WAIT_SECONDS, stats.wait_s),
        (DECODE_SECONDS, meter.decode_s),
        (RESIDUAL_RATIO, None if unsent is None else unsent.residual_ratio),
        (RESIDUAL_GROWING, None if unsent is None else unsent.growing_steps),
        (OLDEST_UNSENT, None if unsent is None else unsent.oldest_steps),
    ]
    readings = [Reading(metric, float(value)) for metric, value in numbers if value is not None]
    return [*readings, Reading(EXCHANGE, 1.0, (exchange,))]
