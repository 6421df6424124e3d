"""The server as a process of its own: trained, killed, drained, and fenced off."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
