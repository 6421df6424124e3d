"""A run whose server and workers are killed (kill -9) ends bit for bit as one that was let be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from integration.torture import ASYNC_LR, Plan, Report, torture
from ps.workers import make_model, values

STEPS = 150
WORKERS = 3
POINTS = ("before-apply", "after-apply", "mid-write", "before-rename", "after-rename")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return torture(tmp_path_factory.mktemp("undisturbed"), Plan(steps=STEPS, workers=WORKERS))


def check(report: Report, undisturbed: Report) -> None:
    every_push = {f"worker{worker}": STEPS for worker in range(WORKERS)}
    assert undisturbed.ending.applied == every_push
    assert undisturbed.ending.version == STEPS
    assert report.ending == undisturbed.ending
    for held in report.held:
        assert torch.equal(held, undisturbed.held[0])


def test_a_server_killed_at_thirty_random_moments(tmp_path: Path, undisturbed: Report) -> None:
    report = torture(tmp_path, Plan(server_kills=30, seed=3))
    check(report, undisturbed)
    assert report.kills["listening"] + report.kills["starting"] == 30
    assert report.lost > 0


@pytest.mark.parametrize("snapshot_every", [1, 7])
def test_a_server_killed_at_each_named_point(
    tmp_path: Path, undisturbed: Report, snapshot_every: int
) -> None:
    calls = {"before-apply": 4, "after-apply": 11, "mid-write": 10}
    crash_at = tuple(f"{point} {calls.get(point, 2)}" for point in POINTS)
    report = torture(tmp_path, Plan(snapshot_every=snapshot_every, crash_at=crash_at))
    check(report, undisturbed)
    assert set(report.kills) == set(POINTS)
    assert (report.lost > 0) == (snapshot_every > 1)


def test_a_server_that_a_shell_starts_is_killed_at_random(
    tmp_path: Path, undisturbed: Report
) -> None:
    report = torture(tmp_path, Plan(server_kills=1, anew=True))
    check(report, undisturbed)


def test_a_worker_killed_and_resumed(tmp_path: Path, undisturbed: Report) -> None:
    report = torture(tmp_path, Plan(worker_kills=3))
    check(report, undisturbed)
    assert report.kills["worker"] == 3


def test_server_and_worker_killed_at_different_times(tmp_path: Path, undisturbed: Report) -> None:
    report = torture(tmp_path, Plan(worker_kills=3, server_kills=6, seed=2))
    check(report, undisturbed)
    assert report.kills["worker"] == 3


def test_server_and_worker_killed_together(tmp_path: Path, undisturbed: Report) -> None:
    report = torture(tmp_path, Plan(worker_kills=3, together=True, snapshot_every=1))
    check(report, undisturbed)
    assert report.kills["worker"] == report.kills["listening"] == 3
    assert report.lost == 0


def test_async_gradients_are_applied_once_each(tmp_path: Path) -> None:
    report = torture(tmp_path, Plan(mode="async", server_kills=6))
    # where answers were lost the order may become another one, and gradients go with later pushes
    assert sum(report.ending.applied.values()) == report.ending.version
    assert all(STEPS / 2 < pushes <= STEPS for pushes in report.ending.applied.values())
    start = values(make_model())
    steps = start - report.central
    given = ASYNC_LR * sum(report.given)
    torch.testing.assert_close(steps, given, rtol=1e-5, atol=1e-5, check_dtype=False)
