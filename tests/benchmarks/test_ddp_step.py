from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ddp_step
import pytest
from harness.ddp_report import Row, draw, summarize, table
from harness.ddp_worker import MIN_PAIRS, PARAMETERS, Measurement
from harness.netns import missing_requirement
from harness.worker_pool import WorkerError, start_workers

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "ddp_step.py"
DENSE_BYTES = 4 * PARAMETERS


def _measurement(step_s: list[float], compute_s: list[float], sent_bytes: float) -> Measurement:
    return Measurement(
        step_s=step_s, compute_s=compute_s, sent_bytes=sent_bytes, tcp_bytes=sent_bytes
    )


def test_a_step_is_as_long_as_its_slowest_rank() -> None:
    ranks = [
        _measurement([0.10, 0.50, 0.30], [0.05, 0.02, 0.04], 10.0),
        _measurement([0.20, 0.10, 0.40], [0.01, 0.03, 0.06], 12.0),
    ]
    row = summarize("1gbit", "fp16", ranks, dense_ms=1000.0)
    assert row.step_ms == pytest.approx(400.0)
    assert row.compute_ms == pytest.approx(50.0)
    assert row.exchange_ms == pytest.approx(350.0)
    assert row.ratio_to_dense == pytest.approx(0.35)
    assert (row.hosts, row.pairs, row.sent_bytes, row.select_ms) == (2, 3, 12.0, None)
    assert summarize("1gbit", "dense", ranks, dense_ms=None).ratio_to_dense == 1.0


def test_table_and_picture_show_a_hook_that_failed(tmp_path: Path) -> None:
    rows = [
        Row(link="loopback", hosts=2, hook="dense", exchange_ms=64.0, compute_ms=60.0,
            sent_bytes=42e6, ratio_to_dense=1.0),
        Row(link="loopback", hosts=2, hook="powersgd1", error="rank 1 ended"),
    ]  # fmt: skip
    lines = table(rows).splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("PowerSGD rank 1 ")] == [
        "failed",
        "failed",
        "failed",
    ]
    assert "64.0 (1.000)" in lines[1]
    draw(rows, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--steps", "2"], "at least 3"),
        (["--hosts", "1"], "at least 2"),
        (["--hooks", "bf16"], "powersgd1"),
        (["--links", "10mbit"], "100mbit"),
    ],
)
def test_bad_options_are_named(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        ddp_step.parse(argv)
    message = capsys.readouterr().err
    assert argv[0] in message
    assert expected in message


def test_without_root_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert ddp_step.main([]) == 2
    assert "need root" in capsys.readouterr().err


def _as_it_is(rank: int, argv: Sequence[str]) -> Sequence[str]:
    return argv


@pytest.mark.gloo
def test_workers_measure_a_hook_and_survives_none_that_fails() -> None:
    with start_workers(2, interface="lo", command=_as_it_is) as workers:
        ranks = workers.measure("dense", max_pairs=9, budget_s=0.0)
        for measured in ranks:
            assert len(measured.step_s) == len(measured.compute_s) == MIN_PAIRS
            assert measured.tcp_bytes == pytest.approx(DENSE_BYTES, rel=0.01)
        with pytest.raises(WorkerError, match="KeyError: 'no such hook'"):
            workers.measure("no such hook", max_pairs=9, budget_s=0.0)


def _namespaces(pid: int) -> list[str]:
    folder = Path("/run/netns")
    return [path.name for path in folder.glob(f"topq-bench-{pid}-*")] if folder.is_dir() else []


def _start(out: Path, *options: str) -> subprocess.Popen[str]:
    reason = missing_requirement()
    if reason is not None:
        pytest.skip(reason)
    command = [sys.executable, str(SCRIPT), "--out", str(out), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def _skip_where_hosts_cannot_be_made(errors: str) -> None:
    if "'ip netns add" in errors and "failed" in errors:
        pytest.skip(f"no network namespaces here: {errors.strip()}")


@pytest.mark.gloo
def test_hosts_on_a_shaped_link_from_start_to_end(tmp_path: Path) -> None:
    choice = ("--links", "1gbit", "--hosts", "2", "--hooks", "dense", "topk")
    process = _start(tmp_path, *choice, "--steps", "3", "--budget-s", "0")
    output, errors = process.communicate(timeout=120)
    _skip_where_hosts_cannot_be_made(errors)
    assert process.returncode == 0, errors
    assert _namespaces(process.pid) == []
    assert "2 hosts: exchange" in output
    assert (tmp_path / "ddp_step.png").exists()
    report = json.loads((tmp_path / "ddp_step.json").read_text())
    dense, topk = report["rows"]
    assert dense["sent_bytes"] == pytest.approx(DENSE_BYTES, rel=0.05)
    assert topk["sent_bytes"] == pytest.approx(DENSE_BYTES * 0.03, rel=0.05)
    # the link, not the machine, sets this floor: 42 MB cannot pass 1 Gbit sooner
    assert dense["step_ms"] > 0.9 * 8e3 * DENSE_BYTES / 1e9


@pytest.mark.gloo
def test_interrupted_it_removes_its_hosts(tmp_path: Path) -> None:
    process = _start(tmp_path, "--links", "100mbit", "--hosts", "2", "--hooks", "dense")
    deadline = time.monotonic() + 60.0
    while len(_namespaces(process.pid)) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    _skip_where_hosts_cannot_be_made(errors)
    assert process.returncode == 130, errors
    assert _namespaces(process.pid) == []
