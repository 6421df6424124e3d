"""The server as a process of its own: trained, killed, drained, and fenced off."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from ps_raw import RawWorker
from server_process import ServerProcess
from torch import Tensor

from topq_dist.compress.codec.frame import encode_non_finite_frame
from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.protocol.types import START, PushRecord, push_digest
from topq_dist.ps.wire import steps
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
    return worker.stub.Status(pb.StatusRequest(state_sha256=True), timeout=10, wait_for_ready=True)


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
        # the last kill may have come after the last step
        together(workers_count, lambda number: workers[number].come_back())
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
            server.start()

    serving = {"snapshot_every": snapshot_every}
    status, held = train_through(tmp_path, ADAMW, serving, kill_often, pause_s=0.1)
    assert status.state_sha256 == undisturbed[0].state_sha256
    assert torch.equal(held[0], undisturbed[1][0])


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_sigterm_drains_and_saves_within_seconds(tmp_path: Path, mode: str) -> None:
    with ServerProcess(tmp_path, {**SGD, "mode": mode}, {"snapshot_every": 1000}) as server:
        a, b = workers_of(server, 2)
        a.join()
        a.step([gradient(0, 0)])
        b.join()
        before = status_of(a)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(a.step, [gradient(0, 1)])  # for b, in sync mode
            time.sleep(0.2)
            started_s = time.monotonic()
            status, errors = server.terminate()
            assert time.monotonic() - started_s < 5
            if mode == "sync":
                with pytest.raises(grpc.RpcError) as refused:
                    waiting.result()
                assert code_of(refused.value) == grpc.StatusCode.UNAVAILABLE
        assert (status, errors) == (0, "")
        server.start()
        after = status_of(a)
        assert after.durable_version == after.point.version
        if mode == "sync":
            assert (after.point, after.state_sha256) == (before.point, before.state_sha256)
        else:
            assert after.point.version == 2


def code_of(error: BaseException) -> grpc.StatusCode | None:
    assert isinstance(error, grpc.Call)
    return error.code()


def test_a_second_server_on_the_same_directory_or_port_fails_saying_why(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "state", SGD) as server:
        same_state = ServerProcess(tmp_path / "state", SGD)
        same_state.launch()
        status, errors = same_state.finish()
        assert status != 0
        assert f"process {server.pid}" in errors
        same_port = ServerProcess(tmp_path / "other", SGD, port=server.port)
        same_port.launch()
        status, errors = same_port.finish()
        assert status != 0
        assert str(server.port) in errors
        worker = workers_of(server, 1)[0]
        worker.join()
        assert worker.step([gradient(0, 0)]).applied is not None


def test_what_is_wrong_is_refused_with_its_status_and_changes_nothing(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, SGD) as server:
        worker, zombie = workers_of(server, 1) + workers_of(server, 1)
        zombie.join()
        worker.join()  # the same name from a newer process
        worker.step([gradient(0, 0)])
        good = worker.push_of([gradient(0, 1)])
        damaged = bytearray(good.frames[0])
        damaged[-1] ^= 1
        altered = [memoryview(bytes(damaged))]
        short = [good.frames[0][:-8]]
        stranger = RawWorker("worker0", {"a.weight": torch.zeros(10)}, server.address)
        other_run = RawWorker("worker0", model(), server.address, instance=b"x" * 16)
        other_run.id, other_run.point = pb.WorkerId(run="f00d"), START
        before = status_of(worker)
        non_finite = encode_non_finite_frame(NUMEL).numpy().data

        def send_truncated() -> None:
            messages = list(steps.step_requests(worker.id, good.record()))
            steps.read_answer(worker.stub.Step(iter(messages[:1]), timeout=10), worker.spec)

        def sent(**changes: Any) -> Callable[[], object]:
            return lambda: worker.send(replace(good, **changes))

        code = grpc.StatusCode
        cases: list[tuple[Callable[[], object], grpc.StatusCode, str]] = [
            (sent(frames=altered), code.INVALID_ARGUMENT, "damaged"),
            (
                sent(frames=altered, digest=push_digest((), altered)),
                code.INVALID_ARGUMENT,
                "checksum",
            ),
            (sent(frames=short, digest=push_digest((), short)), code.INVALID_ARGUMENT, "bytes"),
            (
                sent(frames=[non_finite], digest=push_digest((), [non_finite])),
                code.INVALID_ARGUMENT,
                "NaN",
            ),
            (sent(frames=[memoryview(bytes(1 << 20))]), code.RESOURCE_EXHAUSTED, "at most"),
            (sent(frames=good.frames * 2), code.INVALID_ARGUMENT, "expected 1, or none"),
            (sent(sequence=7), code.OUT_OF_RANGE, "expected push 2"),
            (sent(sequence=1), code.ALREADY_EXISTS, "other contents"),
            (send_truncated, code.INVALID_ARGUMENT, "ended after 0 of"),
            (lambda: zombie.step([gradient(0, 0)]), code.ABORTED, "newer process"),
            (stranger.join, code.FAILED_PRECONDITION, "'a.bias'"),
            (other_run.join, code.FAILED_PRECONDITION, "belongs to run"),
        ]
        for act, expected, words in cases:
            with pytest.raises(grpc.RpcError) as refused:
                act()
            assert code_of(refused.value) == expected, refused.value
            assert words in str(refused.value), refused.value
        after = status_of(worker)
        assert after.state_sha256 == before.state_sha256
        assert after.refused == {
            "damaged": 2,
            "invalid": 3,
            "non_finite": 1,
            "too_large": 1,
            "sequence_gap": 1,
            "digest_differs": 1,
            "old_epoch": 1,
            "model_differs": 1,
            "wrong_run": 1,
        }
        assert worker.send(good).applied is not None


def test_a_worker_killed_and_resumed_walks_the_same_way(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, ADAMW, {"start_workers": 2, "snapshot_every": 3}) as server:
        workers = workers_of(server, 2)
        saved: dict[str, Any] = {}

        def train(number: int) -> None:
            worker = workers[number]
            worker.join()
            for step in range(6):
                worker.step([gradient(number, step)])
                if number == 1 and step == 2:
                    saved["held"], saved["point"] = worker.held.clone(), worker.point
                    saved["sequence"] = worker.sequence

        together(2, train)
        at_five = workers[0].held.clone()
        first = workers[0].push_of([gradient(0, 6)])
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(workers[0].send, first)
            # the second worker dies with its push of step 6 on the way, and resumes from step 3
            lost = workers[1].stub.Step(
                steps.step_requests(
                    workers[1].id,
                    PushRecord(
                        sequence=7,
                        base=workers[1].point or START,
                        frames=(),
                        lr=(),
                        digest=push_digest((), []),
                    ),
                )
            )
            lost.cancel()
            resumed = workers_of(server, 2)[1]
            resumed.held, resumed.point = saved["held"], saved["point"]
            resumed.sequence, resumed.id = saved["sequence"], pb.WorkerId(run=workers[1].id.run)
            resumed.join()
            for step in range(3, 6):
                resumed.step([gradient(1, step)])
            assert torch.equal(resumed.held.flats[0], at_five.flats[0])
            status = status_of(resumed)
            if status.point.version == 6:  # unless the push got through before it was cancelled
                resumed.step([gradient(1, 6)])
            workers[0].take(first, waiting.result())
        assert status_of(resumed).point.version == 7


def test_a_client_that_goes_away_leaves_its_push_and_no_thread(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, SGD, {"max_workers": 2}) as server:
        a, b = workers_of(server, 2)
        a.join()
        b.join()
        push = a.push_of([gradient(0, 0)])
        for _ in range(40):  # more than there are threads, were they not given back
            requests = steps.step_requests(a.id, push.record())
            call = a.stub.Step(requests, timeout=10)
            while not status_of(a).workers[0].waiting:
                time.sleep(0.01)
            call.cancel()
        b.step([gradient(1, 0)])
        answer = a.send(push)
        assert answer.members == ("worker0", "worker1")
        assert status_of(a).point.version == 1


def test_health_and_reflection_answer(tmp_path: Path) -> None:
    with (
        ServerProcess(tmp_path, SGD) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", "topq_dist.v1.ParameterServer"):
            answer = check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert "topq_dist.v1.ParameterServer" in services


def test_a_worker_that_the_snapshot_does_not_know_keeps_its_waiting_push(tmp_path: Path) -> None:
    uploaded, waiting, restarted = threading.Event(), threading.Event(), threading.Event()
    with ServerProcess(tmp_path, SGD, {"start_workers": 2, "snapshot_every": 1000}) as server:

        def work(number: int) -> Tensor:
            if number == 1:
                uploaded.wait(10)
            named = {name: torch.nn.Parameter(tensor) for name, tensor in model().items()}
            with ParameterServerOptimizer(
                named.items(), server.address, q=0, worker=f"w{number}", timeout_s=20
            ) as optimizer:
                if number == 0:
                    uploaded.set()
                    restarted.wait(20)
                for parameter in named.values():
                    parameter.grad = torch.full_like(parameter, 1.0 + number)
                if number == 1:
                    waiting.set()
                optimizer.step()
            return torch.cat([parameter.detach().flatten() for parameter in named.values()])

        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(work, number) for number in range(2)]
            waiting.wait(20)
            time.sleep(0.3)
            server.kill()
            server.start()
            time.sleep(0.3)  # the one that waits comes back before the other
            restarted.set()
            held = [future.result() for future in futures]
    started = torch.cat([tensor.flatten() for tensor in model().values()])
    for one in held:
        torch.testing.assert_close(one, started - 0.1 * 1.5)
