"""Counts of a server: of its rounds, pushes and workers, and what its snapshots are like."""

from __future__ import annotations

import pytest

from topq_dist.ps.server.run_counters import RunCounters, WorkerReport


def counted(counters: RunCounters, waited_s: dict[str, float], *missing: str) -> None:
    counters.version_made(1, waited_s, missing, step_s=0.001, up_bytes=100)


def test_a_round_is_slow_beside_the_median_of_those_before() -> None:
    counters = RunCounters()
    for round_s in (50.0, 0.2, 0.2, 0.2, 0.2):
        counted(counters, {"a": round_s})
    assert counters.slow_rounds == 0  # too few to know what is usual
    for round_s in (0.59, 0.61, 0.2, 0.9):
        counted(counters, {"a": round_s, "b": 0.0})
    assert counters.slow_rounds == 2
    for _ in range(200):
        counted(counters, {"a": 2.0})
    before = counters.slow_rounds
    counted(counters, {"a": 5.9})
    counted(counters, {"a": 6.1})
    assert counters.slow_rounds == before + 1


def test_short_rounds_are_never_slow() -> None:
    counters = RunCounters()
    for round_s in [0.001] * 20 + [0.2, 0.26]:
        counted(counters, {"a": round_s})
    assert counters.slow_rounds == 1


def test_late_twice_in_a_row_counts_once_however_long_it_goes_on() -> None:
    counters = RunCounters()
    for missing in (("b",), (), ("b",), ("b",), ("b",), ("b",), (), ("b",), ("b",)):
        there = {"a": 0.5} if missing else {"a": 0.5, "b": 0.1}
        counted(counters, there, *missing)
    late = counters.worker("b")
    assert (late.late, late.late_in_a_row, late.late_streaks) == (7, 2, 2)
    assert counters.worker("a").late == 0
    assert counters.worker("a").waited_s == pytest.approx(4.5)
    assert counters.worker("b").waited_s == pytest.approx(0.2)


def test_reports_are_averaged_over_a_version_and_nan_is_not_known() -> None:
    counters = RunCounters()
    counters.take_report("a", WorkerReport(loss=2.0, residual_ratio=float("nan")))
    counters.take_report("b", WorkerReport(loss=4.0, residual_ratio=5.0))
    counters.take_report("c", WorkerReport(loss=100.0))
    counted(counters, {"a": 0.1, "b": 0.2})
    point = counters.points[-1]
    assert (point.loss, point.residual_ratio, point.up_bytes, point.round_s) == (3.0, 5.0, 50, 0.2)
    counters.keep_only(["b"])
    assert counters.worker("b").report.loss == 4.0
    assert counters.worker("a").report.loss is None


def test_a_mean_that_overflows_is_not_known() -> None:
    counters = RunCounters()
    for worker in ("a", "b"):
        counters.take_report(worker, WorkerReport(loss=1.7e308, residual_ratio=1.0))
    counted(counters, {"a": 0.1, "b": 0.2})
    assert counters.points[-1].loss is None
    assert counters.points[-1].residual_ratio == 1.0


def test_points_are_bounded() -> None:
    counters = RunCounters()
    for _ in range(5_000):
        counted(counters, {"a": 0.1})
    assert len(counters.points) == 4096
    assert counters.pushes["applied"] == 5_000
