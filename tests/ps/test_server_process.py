"""The server as a process of its own: trained, killed, drained, and fenced off."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from ps_raw import RawWorker, ServerProcess
from torch import Tensor

from topq_dist.v1 import parameter_server_pb2 as pb

SGD = {"inner_opt": "sgd", "options": {"lr": 0.1}}
ADAMW = {"inner_opt": "adamw", "options": {"lr": 0.01}}
NUMEL = 10


def model() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(4)}


def gradient(worker: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + worker)
    return torch.randn(NUMEL, generator=generator)


def workers_of(server: ServerProcess, count: int) -> list[RawWorker]:
    return [RawWorker(f"worker{number}", model(), server.address) for number in range(count)]


def together(count: int, act: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(act, range(count)))


def status_of(worker: RawWorker) -> pb.StatusResponse:
    return worker.stub.Status(pb.StatusRequest(state_sha256=True), timeout=10)


def test_two_workers_walk_one_way_and_it_is_sgds(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, SGD, {"start_workers": 2}) as server:
        workers = workers_of(server, 2)

        def train(number: int) -> None:
            workers[number].join()
            for step in range(5):
                answer = workers[number].step([gradient(number, step)])
                assert answer.members == ("worker0", "worker1")

        together(2, train)
        for worker in workers:
            assert worker.point is not None
            assert worker.point.version == 5
        status = status_of(workers[0])
        held = [worker.held.flats[0] for worker in workers]
    expected = torch.cat([tensor.reshape(-1) for tensor in model().values()])
    for step in range(5):
        expected -= 0.1 * (gradient(0, step) / 2 + gradient(1, step) / 2)
    torch.testing.assert_close(held[0], expected)
    assert torch.equal(held[0], held[1])
    assert status.point.version == 5
    assert [(worker.sequence, worker.lag) for worker in status.workers] == [(5, 0), (5, 0)]


STEPS = 12


def train_through(
    tmp_path: Path,
    training: dict[str, Any],
    serving: dict[str, Any],
    disturb: Callable[[ServerProcess, list[RawWorker]], None] = lambda server, workers: None,
    *,
    crash_at: str = "",
    workers_count: int = 2,
    pause_s: float = 0.0,
) -> tuple[pb.StatusResponse, list[Tensor]]:
    """Train while `disturb` runs; return the last status and what each worker holds."""
    serving = {"start_workers": workers_count, "snapshot_every": 3, **serving}
    server = ServerProcess(tmp_path, training, serving)
    server.start(crash_at)
    workers = workers_of(server, workers_count)
    end_s = time.monotonic() + 40
    try:

        def train(number: int) -> None:
            workers[number].join_through(end_s)
            for step in range(STEPS):
                workers[number].step_through([gradient(number, step)], end_s)
                time.sleep(pause_s)

        with ThreadPoolExecutor(workers_count) as pool:
            futures = [pool.submit(train, number) for number in range(workers_count)]
            disturb(server, workers)
            for future in futures:
                future.result()
        return status_of(workers[0]), [worker.held.flats[0] for worker in workers]
    finally:
        for worker in workers:
            worker.close()
        server.__exit__()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[pb.StatusResponse, list[Tensor]]:
    return train_through(tmp_path_factory.mktemp("undisturbed"), ADAMW, {})


@pytest.mark.parametrize(
    "crash_at",
    [
        "before-apply 1",
        "before-apply 6",
        "after-apply 6",
        "after-apply 12",
        "mid-snapshot 1",
        "mid-snapshot 5",
        "before-rename 2",
        "after-rename 2",
        "after-rename 3",
    ],
)
def test_a_server_killed_at_a_named_point_loses_and_doubles_nothing(
    tmp_path: Path, undisturbed: tuple[pb.StatusResponse, list[Tensor]], crash_at: str
) -> None:
    def restart(server: ServerProcess, workers: list[RawWorker]) -> None:
        status, _ = server.finish()
        assert status == -signal.SIGKILL
        server.start()

    status, held = train_through(tmp_path, ADAMW, {}, restart, crash_at=crash_at)
    assert status.point == undisturbed[0].point
    assert status.state_sha256 == undisturbed[0].state_sha256
    for mine, other in zip(held, undisturbed[1], strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("snapshot_every", [1, 5])
def test_a_server_killed_again_and_again_loses_and_doubles_nothing(
    tmp_path: Path, undisturbed: tuple[pb.StatusResponse, list[Tensor]], snapshot_every: int
) -> None:
    def kill_often(server: ServerProcess, workers: list[RawWorker]) -> None:
        chance = random.Random(snapshot_every)
        for _ in range(4):
            time.sleep(chance.uniform(0.05, 0.4))
            server.kill()
            server.finish()
            server.start()

    serving = {"snapshot_every": snapshot_every}
    status, held = train_through(tmp_path, ADAMW, serving, kill_often, pause_s=0.1)
    assert status.state_sha256 == undisturbed[0].state_sha256
    assert torch.equal(held[0], undisturbed[1][0])
