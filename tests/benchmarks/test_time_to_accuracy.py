from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import time_to_accuracy
from forked_scripts import Script, run_scripts
from harness import time_to_accuracy_worker
from harness.netns import HostsError, missing_requirement
from harness.time_to_accuracy_report import (
    Curve,
    curve_of,
    draw,
    failed,
    row_of,
    table,
    target_of,
    with_target,
)
from harness.time_to_accuracy_worker import Job, Outcome
from harness.worker_pool import WorkerError
from time_to_accuracy import Place

RECIPE = replace(time_to_accuracy.QUICK, steps=100)


def _outcome(*training_s: float, accuracy: tuple[float, ...], sent_bytes: int) -> Outcome:
    return Outcome(
        parameters=10,
        step_s=[0.1, 0.2, 0.9],
        steps=[10 * (place + 1) for place in range(len(training_s))],
        training_s=list(training_s),
        accuracy=list(accuracy),
        sent_bytes=[sent_bytes * (place + 1) for place in range(len(training_s))],
        chosen_exchange=None,
    )


def _curve(*accuracy: float, step_ms: float) -> Curve:
    steps = [10 * (place + 1) for place in range(len(accuracy))]
    return Curve(
        steps=steps,
        accuracy=list(accuracy),
        training_s=[],
        sent_bytes=[],
        step_ms=0.0,
    ).at_pace(step_ms, 100.0)


def test_an_interval_is_as_long_as_its_slowest_rank_and_each_rank_tests_its_share() -> None:
    curve = curve_of(
        [
            _outcome(1.0, 5.0, accuracy=(50.0, 60.0), sent_bytes=7),
            _outcome(2.0, 4.0, accuracy=(52.0, 61.0), sent_bytes=9),
        ]
    )
    assert curve.training_s == [2.0, 6.0]
    assert curve.accuracy == [51.0, 60.5]
    assert curve.sent_bytes == [9, 18]
    assert curve.step_ms == pytest.approx(200.0)


def test_the_target_is_reached_by_the_mean_of_the_seeds() -> None:
    dense = [_curve(50.0, 80.0, 90.0, step_ms=1e3), _curve(60.0, 84.0, 88.0, step_ms=1e3)]
    early = [_curve(40.0, 90.0, 95.0, step_ms=100.0), _curve(40.0, 86.0, 85.0, step_ms=100.0)]
    target = target_of(dense)
    assert target == 88.5
    first, second, third = with_target(
        [
            row_of("1gbit", "dense", dense, estimated=True),
            row_of("1gbit", "topq", early, estimated=False),
            row_of("1gbit", "powersgd1", [_curve(10.0, 20.0, step_ms=1.0)], estimated=False),
        ],
        target,
    )
    assert (first.steps_to_target, first.seconds_to_target, first.times_shorter) == (30, 30.0, 1.0)
    assert (second.steps_to_target, second.seconds_to_target) == (30, 3.0)
    assert second.times_shorter == pytest.approx(10.0)
    assert (second.step_bytes, second.sent_bytes_to_target) == (100.0, 3000.0)
    assert (third.steps_to_target, third.times_shorter, third.final_accuracy) == (None, None, 20.0)


def test_table_and_picture_show_what_failed_and_what_was_not_reached(tmp_path: Path) -> None:
    rows = with_target(
        [
            row_of("100mbit", "dense", [_curve(80.0, 90.0, step_ms=1e3)], estimated=True),
            row_of("100mbit", "powersgd1", [_curve(70.0, 80.0, step_ms=9.0)], estimated=False),
            failed("100mbit", "topq", "rank 1 ended"),
        ],
        89.5,
    )
    lines = table(rows, 89.5).splitlines()
    assert lines[0].startswith("100 Mbit")
    assert lines[1].startswith("dense *")
    assert "not reached" in lines[2]
    assert lines[3].split()[-1] == "failed"
    assert "dense has none" in table(with_target(rows, None), None)
    draw(rows, 89.5, "digits", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_rate_rises_and_falls_to_a_twentieth() -> None:
    factors = [RECIPE.rate_factor(step) for step in range(101)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[100] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--methods", "topq"], "dense"),
        (["--methods", "bf16"], "powersgd1"),
        (["--links", "10mbit"], "100mbit"),
        (["--steps", "0"], "at least 1"),
    ],
)
def test_bad_options_are_named(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        time_to_accuracy.parse(argv)
    message = capsys.readouterr().err
    assert argv[0] in message
    assert expected in message


def test_without_root_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert time_to_accuracy.main([]) == 2
    assert "need root" in capsys.readouterr().err


@pytest.mark.gloo
def test_a_method_that_fails_leaves_its_error() -> None:
    job = Job(recipe=RECIPE, method="no such method", seed=0, run_steps=1)
    with pytest.raises(WorkerError, match="KeyError: 'no such method'"):
        time_to_accuracy.run_ranks(time_to_accuracy.HERE, job)


def forked_ranks(place: Place, job: Job) -> list[Outcome]:
    """Do as run_ranks does, in processes that have torch already."""
    with tempfile.TemporaryDirectory() as folder:
        counted = None if place.shared else place.interface
        jobs = [replace(job, rank=rank, folder=folder, interface=counted) for rank in range(2)]
        scripts = [
            Script(
                path=Path(time_to_accuracy_worker.__file__),
                words=[json.dumps(asdict(one))],
                variables={"GLOO_SOCKET_IFNAME": place.interface},
                # ip netns exec NAME ...
                namespace=None if place.shared else place.command(one.rank, [])[3],
            )
            for one in jobs
        ]
        run_scripts(scripts)
        return [Outcome(**json.loads(one.answer_path().read_text())) for one in jobs]


@pytest.mark.gloo
@pytest.mark.timeout(400)
def test_quick_trains_on_every_link_and_dense_is_estimated_on_a_shaped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(time_to_accuracy, "run_ranks", forked_ranks)
    links = ["loopback"] if missing_requirement() else ["loopback", "1gbit"]
    options = ["--quick", "--out", str(tmp_path), "--links", *links]
    try:
        ended = time_to_accuracy.main([*options, "--methods", "dense", "topq_allgather"])
    except HostsError as error:
        pytest.skip(f"no network namespaces here: {error}")
    assert ended == 0
    assert "ms a step" in capsys.readouterr().out
    report = json.loads((tmp_path / "time_to_accuracy.json").read_text())
    assert report["settings"]["parameters"] == 6570
    assert (tmp_path / "time_to_accuracy.png").exists()
    dense, topq, *shaped = report["rows"]
    assert dense["times_shorter"] == 1.0
    assert not dense["estimated"]
    # lo is everybody's
    assert dense["step_bytes"] is topq["step_bytes"] is None
    assert topq["steps"] == dense["steps"] == [10, 20, 30, 40]
    assert topq["final_accuracy"] > 60.0
    if not shaped:
        pytest.skip(f"no shaped link here: {missing_requirement()}")
    dense, topq = shaped
    assert (dense["estimated"], topq["estimated"]) == (True, False)
    assert dense["step_bytes"] == pytest.approx(4 * 6570, rel=0.2)
    assert dense["training_s"] == pytest.approx(
        [1e-3 * n * dense["step_ms"] for n in (10, 20, 30, 40)]
    )
    assert topq["curves"][0]["training_s"] == topq["training_s"]
    assert topq["step_bytes"] < 0.2 * dense["step_bytes"]
