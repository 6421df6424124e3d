"""Alert rules and dashboard, with Prometheus itself, a server, its workers and a rank."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from deploy.prometheus_server import MONITORING, Prometheus, prometheus, tool
from ps.workers import backward, batch, make_model, side_by_side
from served import Served

from topq_dist.ps import ParameterServerOptimizer, ServerLostError
from topq_dist.telemetry import METRICS

RULES = (MONITORING / "alerts.yml").read_text()
ALERTS = sorted(re.findall(r"alert: (\w+)", RULES))
# longer than a busy machine takes for one by itself
ROUND_S = 4.0


def test_the_rules_are_right_and_stop_at_their_limits() -> None:
    for words in (
        ["check", "rules", "alerts.yml"],
        ["check", "config", "prometheus.yml"],
        ["test", "rules", "alerts_test.yml"],
    ):
        done = subprocess.run(
            [tool("promtool"), *words], cwd=MONITORING, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(ALERTS) == 5


def expressions() -> list[str]:
    """Return what the dashboard's charts ask for, of any server and rank."""
    dashboard = json.loads((MONITORING / "grafana_dashboard.json").read_text())
    found = [one["expr"] for panel in dashboard["panels"] for one in panel.get("targets", ())]
    filled = [one.replace("$__rate_interval", "1m") for one in found]
    return [re.sub(r'=~"\$\w+"', '=~".*"', one) for one in filled]


def test_rules_and_dashboard_ask_for_metrics_that_there_are() -> None:
    shown = {one.shown_name for one in METRICS}
    histograms = {one.name for one in METRICS if one.kind == "histogram"}
    shown |= {f"{name}_{end}" for name in histograms for end in ("bucket", "sum", "count")}
    text = "\n".join([*expressions(), RULES]).replace("topq_dist", "")
    asked = set(re.findall(r"\btopq_\w+", text))
    assert asked <= shown
    # and leave out next to nothing
    assert {one for one in shown - asked if not one.endswith("_sum")} <= histograms | {
        "topq_server_run_info",
        "topq_server_parameters",
        "topq_server_snapshot_size_bytes",
        "topq_server_snapshot_duration_seconds_count",
    }


@contextmanager
def watched_rank(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    script = Path(__file__).with_name("watched_rank.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder / "store")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.communicate(timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def goes_through(rank: subprocess.Popen[str], what: str) -> None:
    assert rank.stdin is not None
    assert rank.stdout is not None
    rank.stdin.write(f"{what}\n")
    rank.stdin.flush()
    assert rank.stdout.readline() == "done\n"


class Job:
    """Two workers of a server, of which one can be late."""

    def __init__(self, address: str) -> None:
        self.models = [make_model(), make_model()]

        def join(number: int) -> ParameterServerOptimizer:
            named = self.models[number].named_parameters()
            return ParameterServerOptimizer(named, address, worker=f"w{number}", q=0.9)

        self.optimizers = side_by_side(2, join)
        self.step = 0

    def train(self, steps: int, *, late_s: float = 0.0) -> None:
        """Take steps; with late_s the second worker begins so much later, and takes one."""
        together = threading.Barrier(2, timeout=60)

        def work(number: int) -> None:
            together.wait()
            time.sleep(late_s * number)
            for step in range(1 if late_s and number else steps):
                backward(self.models[number], [batch(number, self.step + step)])
                self.optimizers[number].report(loss=torch.tensor(1.0))
                self.optimizers[number].step()

        side_by_side(2, work)
        self.step += steps

    def close(self) -> None:
        """Leave, whether the server is still there or not."""

        def leave(number: int) -> None:
            with suppress(ServerLostError):
                self.optimizers[number].close(timeout_s=5.0)

        side_by_side(2, leave)


def test_every_alert_tells_once_of_what_it_is_about(tmp_path: Path) -> None:
    tool("prometheus")
    # what is told of after minutes is told of after seconds here
    rules = RULES.replace("> 120", "> 1.5")
    assert rules != RULES
    words = f"--address 127.0.0.1:0 --state-dir {tmp_path / 'run'} --inner-opt sgd --lr 0.01"
    words += f" --workers 2 --snapshot-every 5 --round-timeout-s {ROUND_S} --metrics 127.0.0.1:0"
    served = Served(*words.split())
    try:
        where = served.line().removeprefix("metrics at http://").removesuffix("/metrics\n")
        targets = {"topq-server": [where]}
        with watched_rank(tmp_path) as (rank, of_rank):
            targets["topq-rank"] = [of_rank]
            with prometheus(tmp_path, rules, targets) as server:
                job = Job(served.address)
                try:
                    faults(server, job, rank, served.pid)
                finally:
                    job.close()
    finally:
        served.kill()


def faults(server: Prometheus, job: Job, rank: subprocess.Popen[str], server_pid: int) -> None:
    job.train(12)
    goes_through(rank, "well 120")
    version = "topq_server_version >= 12 and on () (sum(topq_steps_total) == 120)"
    server.wait_until(lambda: bool(server.query(version)), "both are asked")
    server.wait_until(lambda: bool(server.query("topq_server_worker_loss")), "workers report")
    slow = "TopqSlowRound"  # which a busy machine has by itself

    def told() -> list[str]:
        return [one for one in server.firing() if one != slow]

    assert told() == []
    assert [one["value"][1] for one in server.query("up")] == ["1", "1"]
    for expression in expressions():
        server.query(expression)  # raises where it is none

    goes_through(rank, "badly 300")
    server.wait_until(lambda: told() == ["TopqVoidSteps"], "void steps")
    goes_through(rank, "badly 400")
    rank_alerts = ["TopqResidualGrowing", "TopqVoidSteps"]
    server.wait_until(lambda: told() == rank_alerts, "growing residuals")

    job.train(3, late_s=1.5 * ROUND_S)
    # the first of these rounds has waited for the worker as long as one may
    late = sorted([*rank_alerts, slow, "TopqWorkerLateTwice"])
    server.wait_until(lambda: server.firing() == late, "a worker that is late")
    (found,) = server.query('ALERTS{alertname="TopqWorkerLateTwice"}')
    assert found["metric"]["worker"] == "w1"

    # no file may have a byte: the disk is full
    before = resource.prlimit(server_pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    job.train(6)
    server.wait_until(lambda: server.firing() == ALERTS, "a snapshot that cannot be written")
    resource.prlimit(server_pid, resource.RLIMIT_FSIZE, before)
    server.wait_until(lambda: "TopqSnapshotTooOld" not in server.firing(), "it can be again")
    spans = server.spans('ALERTS{alertstate="firing"}', time.time() - 300, time.time())
    assert sorted(labels["alertname"] for labels, _ in spans) == ALERTS
    assert [times for _, times in spans] == [1] * len(ALERTS)
