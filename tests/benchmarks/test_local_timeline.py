"""The benchmark of local steps: a rank that measures, and what becomes of its figures."""

from __future__ import annotations

import os
from pathlib import Path

import local_steps
import pytest
from harness import local_worker
from harness.ddp_worker import Job, Measurement
from harness.local_report import Row, draw, link_load, summarize, table
from torch import nn


def _measurement(step_s: list[float], compute_s: list[float]) -> Measurement:
    timeline = {
        "steps": [[0.0, 0.1, 0.11], [0.11, 0.2, 0.2]],
        "sent": [[0.0, 0.0], [0.1, 1e6], [0.2, 1e6]],
    }
    return Measurement(
        step_s=step_s, compute_s=compute_s, sent_bytes=5.0, tcp_bytes=5.0, timeline=timeline
    )


def test_a_block_is_as_long_as_its_slowest_ranks(tmp_path: Path) -> None:
    ranks = [
        _measurement([0.10, 0.30, 0.20], [0.10, 0.20, 0.10]),
        _measurement([0.11, 0.20, 0.20], [0.10, 0.10, 0.20]),
    ]
    row = summarize("1gbit", "top-Q rounds", ranks)
    assert row.ratio == pytest.approx(1.1)
    assert (row.lowest_ratio, row.highest_ratio) == pytest.approx((1.0, 1.5))
    failed = Row(link="1gbit", method="top-Q, streamed", error="rank 1 ended")
    lines = table([row, failed]).splitlines()
    assert "200 ms (+10.0 %)" in lines[1]
    assert lines[2].endswith("failed")
    draw([row, failed], "title", tmp_path / "lines.png")
    assert (tmp_path / "lines.png").read_bytes().startswith(b"\x89PNG")


def test_the_load_of_a_link_is_a_share_of_what_it_carries() -> None:
    at_s, load = link_load([[0.0, 0.0], [0.5, 6.25e6], [1.0, 6.25e6], [1.1, 1e9]], 1e9)
    assert at_s == [0.5, 1.0, 1.1]
    assert load == pytest.approx([0.1, 0.0, 1.0])


def test_without_root_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert local_steps.main([]) == 2
    assert "need root" in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", local_worker.METHODS)
def test_a_rank_measures_whole_periods(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_worker, "WIDTH", 8)
    monkeypatch.setattr(
        local_worker, "build_model", lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    )
    job = Job(
        rank=0,
        world_size=1,
        store=str(tmp_path / "store"),
        hook=method,
        max_pairs=2,
        budget_s=0.0,
        interface="lo",
    )
    measured = local_worker.measure(job)
    assert len(measured.step_s) == len(measured.compute_s) == 2
    assert measured.sent_bytes > 0
    assert measured.timeline is not None
    for start_s, stepped_s, ended_s in measured.timeline["steps"]:
        assert start_s < stepped_s < ended_s
