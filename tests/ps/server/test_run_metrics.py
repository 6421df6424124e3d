"""A server's metrics, while real workers train through it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from http_get import got
from ps.bench import Make, push_of
from ps.servers import serving
from ps.workers import backward, batch, make_model, side_by_side

from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig
from topq_dist.ps.protocol.types import START
from topq_dist.ps.server.process import ParameterServer
from topq_dist.ps.server.run_metrics import RunMetrics
from topq_dist.ps.server.view_addresses import check_views
from topq_dist.telemetry import Reading

SGD = {"inner_opt": "sgd", "options": {"lr": 0.1}, "downlink": "topq"}


def numbers_at(url: str) -> dict[str, float]:
    lines = got(url).splitlines()
    return {
        name.replace('"', ""): float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


def by_name(readings: list[Reading]) -> dict[tuple[str, ...], float]:
    return {
        (one.metric.name.removeprefix("topq_server_"), *one.labels): one.value for one in readings
    }


def test_workers_report_where_somebody_looks_on(tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=60)
    with serving(tmp_path, SGD, start_workers=2, snapshot_every=5, metrics="0") as server:

        def train(number: int) -> dict[str, float]:
            model = make_model()
            optimizer = ParameterServerOptimizer(
                model.named_parameters(), str(server.address), worker=f"w{number}", q=0.8
            )
            for step in range(15):
                optimizer.zero_grad()
                loss = backward(model, [batch(number, step)])
                if number == 0:
                    optimizer.report(loss=loss.clone().requires_grad_())
                    optimizer.step()
                else:
                    optimizer.step(lambda: 2.5)
            together.wait()
            found = {reading.metric.name: reading.value for reading in optimizer.readings()}
            found["ratio"] = optimizer.stats().ratio
            numbers = numbers_at(server.views["metrics"]) if number == 0 else {}
            together.wait()
            optimizer.close()
            return found | numbers

        seen, other = side_by_side(2, train)
    assert seen["topq_server_version"] == 15
    assert seen["topq_server_durable_version"] in (0, 5, 10, 15)
    assert seen["topq_server_pushes_total{outcome=applied}"] == 30
    assert seen["topq_server_round_duration_seconds_count"] == 15
    assert seen["topq_server_worker_late_total{worker=w0}"] == 0
    assert seen["topq_server_worker_loss{worker=w1}"] == 2.5
    assert 0 < seen["topq_server_worker_loss{worker=w0}"] < 2
    assert seen["topq_server_worker_residual_ratio{worker=w1}"] > 0
    assert seen["topq_server_worker_oldest_unsent_steps{worker=w0}"] > 0
    up = seen["topq_server_received_dense_bytes_total"] / seen["topq_server_received_bytes_total"]
    assert up > 2
    assert other["ratio"] == pytest.approx(up, rel=0.05)
    assert seen["topq_steps"] == other["topq_steps"] == 15
    assert seen["topq_residual_ratio"] > 0
    assert seen["topq_decode_seconds"] > 0
    assert seen["topq_server_decode_seconds_total"] > 0


def test_workers_measure_nothing_where_nobody_looks_on(tmp_path: Path) -> None:
    with serving(tmp_path, SGD) as server:
        model = make_model()
        with ParameterServerOptimizer(
            model.named_parameters(), str(server.address), worker="a"
        ) as optimizer:
            optimizer.report(loss=torch.tensor(1.0))
            backward(model, [batch(0, 0)])
            optimizer.step()
            names = {reading.metric.name for reading in optimizer.readings()}
            with pytest.raises(ValueError, match="loss has 2 elements: expected one"):
                optimizer.report(loss=torch.zeros(2))
        assert server.coordinator.counters.worker("a").report.loss is None
        assert server.views == {}
    assert "topq_residual_ratio" not in names


def test_a_worker_is_late_where_a_version_is_made_without_it(make: Make) -> None:
    bench = make(round_timeout_s=2.0)
    a, b = bench.join("a"), bench.join("b")
    metrics = RunMetrics(bench.server)
    for sequence in range(1, 4):
        pending = bench.submit(push_of(a, sequence, bench.point if sequence > 1 else START))
        if sequence == 1:  # the later ones do not wait for it
            bench.clock.pass_s(1.9)
            assert by_name(metrics.readings())["worker_late", "b"] == 0
            bench.clock.pass_s(0.2)
        bench.answer(pending)
    seen = by_name(metrics.readings())
    assert seen["worker_late", "b"] == 3
    assert seen["worker_late_streaks", "b"] == 1
    assert seen["worker_late", "a"] == seen["worker_late_streaks", "a"] == 0
    late = bench.answer(bench.submit(push_of(b, 1, START)))
    assert late.applied is None
    both = [bench.submit(push_of(caller, n, bench.point)) for caller, n in ((a, 4), (b, 1))]
    bench.answer(both[0])
    seen = by_name(metrics.readings())
    assert seen["pushes", "stale"] == 1
    assert seen["worker_late", "b"] == 3
    assert seen["workers",] == 2
    assert seen["unsaved_seconds",] > 0
    assert seen["snapshot_overdue_seconds",] == 0


def test_a_snapshot_that_cannot_be_written_is_overdue(make: Make) -> None:
    bench = make(snapshot_every=2)
    a = bench.join("a")
    metrics = RunMetrics(bench.server)
    bench.server._snapshotter.close()  # nobody writes any more
    for sequence in (1, 2):
        bench.answer(bench.submit(push_of(a, sequence, bench.point if sequence > 1 else START)))
    seen = by_name(metrics.readings())
    assert seen["snapshot_overdue_seconds",] > 0
    assert seen["unsaved_seconds",] >= seen["snapshot_overdue_seconds",]
    bench.server._snapshotter.save()
    seen = by_name(metrics.readings())
    assert seen["snapshot_overdue_seconds",] == seen["unsaved_seconds",] == 0
    assert seen["snapshot_size_bytes",] == bench.state_dir.snapshot_path.stat().st_size


@pytest.mark.parametrize("where", ["nowhere", "127.0.0.1:70000", "unix:/tmp/x", "", ":", "a:b"])
def test_an_address_that_is_none_is_refused_by_name(where: str) -> None:
    with pytest.raises(ValueError, match=rf"metrics='{where}': expected HOST:PORT"):
        check_views(ServingConfig(metrics=where))
    with pytest.raises(ValueError, match=rf"http='{where}': expected HOST:PORT"):
        check_views(ServingConfig(http=where))
    check_views(ServingConfig(metrics="9464", http=":8080"))
    check_views(ServingConfig(metrics="[::1]:0", http="0.0.0.0:8080"))


def test_a_view_that_is_refused_leaves_the_state_directory_alone(tmp_path: Path) -> None:
    training, serving = TrainingConfig(inner_opt="sgd"), ServingConfig(http="nowhere")
    state_dir = tmp_path / "state"
    with pytest.raises(ValueError, match="http='nowhere'"):
        ParameterServer(training, serving, state_dir=state_dir, address="127.0.0.1:0")
    assert not state_dir.exists()
