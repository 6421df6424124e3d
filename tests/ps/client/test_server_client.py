"""One worker's place at one server: retry, replay, staleness, leases, and servers that are gone."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from ps.client.test_shard import planned
from ps.servers import Options, serving
from ps.workers import backward, batch, make_model, side_by_side, values
from server_process import ServerProcess
from torch import Tensor, nn

from topq_dist.compress.compressor import TopKCompressor
from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.client.call_errors import TransientError
from topq_dist.ps.client.connection import Connection
from topq_dist.ps.client.replay_log import ReplayLog
from topq_dist.ps.client.server_client import ServerClient
from topq_dist.ps.client.shard import Shard, frames_of
from topq_dist.ps.protocol.errors import FencedError, ServerLostError, WrongRunError
from topq_dist.ps.protocol.types import START, ModelVersion, NewPush
from topq_dist.ps.security.policy import ClientSecurity
from topq_dist.ps.server.process import ParameterServer

PLAIN: Options = {"inner_opt": "sgd", "options": {"lr": 1.0}}


@contextmanager
def client_of(
    server: ParameterServer | ServerProcess, worker: str = "w0", *, timeout_s: float = 20.0
) -> Iterator[tuple[ServerClient, Shard]]:
    """Join as a worker with one parameter of four zeros."""
    shard = Shard(
        {"weight": nn.Parameter(torch.zeros(4))},
        TopKCompressor(value_format=None, error_feedback=True),
    )
    client = ServerClient(
        shard.model,
        address=str(server.address),
        worker=worker,
        timeout_s=timeout_s,
        security=ClientSecurity(),
    )
    client.start()
    try:
        yield client, shard
    finally:
        client.close(timeout_s=1.0)


def push(client: ServerClient, shard: Shard, *gradient: float, q: float = 0.0) -> None:
    shard.parameters["weight"].grad = torch.tensor(gradient, dtype=torch.float32)
    made = shard.compress(planned(shard, q))
    for part in made:
        shard.compressor.residuals.apply(part.update)
    client.begin(NewPush(frames=frames_of(made)))


def held(client: ServerClient) -> list[float]:
    numbers: list[float] = client.model.tensors()["weight"].tolist()
    return numbers


def test_a_call_that_breaks_is_sent_again_and_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path, PLAIN) as server, client_of(server) as (client, shard):
        whole = Connection.step
        answers = []

        def lose_the_first_answer(*arguments):  # type: ignore[no-untyped-def]
            answers.append(whole(*arguments))
            if len(answers) == 1:
                raise TransientError("lost on its way")
            return answers[-1]

        monkeypatch.setattr(Connection, "step", lose_the_first_answer)
        push(client, shard, 1, 2, 3, 4)
        client.finish()
        assert len(answers) == 2
        assert answers[0].applied == answers[1].applied
        assert held(client) == [-1, -2, -3, -4]
        assert server.coordinator.status().point.version == 1


def test_what_a_stale_push_held_is_in_the_residual_again(tmp_path: Path) -> None:
    training = {**PLAIN, "mode": "async", "max_staleness": 0}
    with (
        serving(tmp_path, training) as server,
        client_of(server, "a") as (first, of_first),
        client_of(server, "b") as (second, of_second),
    ):
        push(first, of_first, 1, 2, 3, 4, q=0.5)
        push(second, of_second, 10, 20, 30, 40, q=0.5)
        first.finish()
        second.finish()
        (refused,) = second.collect().taken_back
        assert second.pushes.next_sequence == 1
        assert held(second) == held(first) == [0, 0, -3, -4]
        of_second.restore_residual(refused)
        residuals = of_second.compressor.residuals.state_dict()["weight"].tolist()
        assert residuals == [10, 20, 30, 40]
        push(second, of_second, 0, 0, 0, 0)
        second.finish()
        assert held(second) == [-10, -20, -33, -44]


def test_pushes_are_kept_until_they_are_durable(tmp_path: Path) -> None:
    with (
        serving(tmp_path, PLAIN, snapshot_every=1000) as server,
        client_of(server) as (client, shard),
    ):
        for _ in range(3):
            push(client, shard, 1, 1, 1, 1)
            client.finish()
        assert client.pushes.first_kept == 1
        client.close()
        assert server.coordinator.status().durable_version == 3


def test_a_last_push_that_the_server_lost_is_replayed_before_leaving(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, PLAIN, {"snapshot_every": 1000}) as server:
        with client_of(server) as (client, shard):
            for _ in range(3):
                push(client, shard, 1, 2, 3, 4)
                client.finish()
            server.kill()
            server.start()
            client.close()
        with client_of(server, "other") as (other, _):
            assert other.point.version == 3
            assert held(other) == [-3, -6, -9, -12]


def test_the_lease_is_kept_between_steps(tmp_path: Path) -> None:
    with (
        serving(tmp_path, PLAIN, start_workers=2, lease_s=0.6) as server,
        client_of(server, "a") as (first, of_first),
        client_of(server, "b") as (second, of_second),
    ):
        push(first, of_first, 2, 2, 2, 2)
        waiting = threading.Thread(target=first.finish)
        waiting.start()
        time.sleep(1.5)  # more than two leases: without renewal the round would close
        push(second, of_second, 4, 4, 4, 4)
        second.finish()
        waiting.join(20)
        assert held(first) == held(second) == [-3, -3, -3, -3]


def test_a_newer_process_with_the_name_fences_the_older_off(tmp_path: Path) -> None:
    with serving(tmp_path, PLAIN) as server, client_of(server) as (older, shard):
        push(older, shard, 1, 1, 1, 1)
        older.finish()
        with client_of(server) as (newer, _):
            assert newer.pushes.next_sequence == 2
            push(older, shard, 1, 1, 1, 1)
            with pytest.raises(FencedError, match=rf"{server.address}.*newer process"):
                older.finish()
            assert server.coordinator.status().point.version == 1
        older._closing.set()


def test_a_server_that_began_anew_is_another_run(tmp_path: Path) -> None:
    with serving(tmp_path / "1", PLAIN) as one, client_of(one) as (client, _):
        run = client.run
    with serving(tmp_path / "2", PLAIN) as two, client_of(two) as (client, _):
        client.check_run(client.run)
        with pytest.raises(WrongRunError, match=run):
            client.check_run(run)


def dead_port() -> int:
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        port: int = end.getsockname()[1]
        return port


def test_a_server_that_is_not_there_is_named_in_time() -> None:
    address = f"127.0.0.1:{dead_port()}"
    started_s = time.monotonic()
    with pytest.raises(ServerLostError, match=f"{address}: no answer within 1 s: .*refused"):
        ParameterServerOptimizer(make_model().named_parameters(), address, timeout_s=1)
    assert time.monotonic() - started_s < 5


def test_one_that_takes_connections_and_says_nothing_is_named_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        started_s = time.monotonic()
        with pytest.raises(ServerLostError, match=f"{address}: no answer within 1 s"):
            ParameterServerOptimizer(make_model().named_parameters(), address, timeout_s=1)
        assert time.monotonic() - started_s < 6


def state_of(pid: int) -> str:
    """Return the letter by which Linux tells a process's state, X once it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_dies_between_steps_is_named_in_time(tmp_path: Path, how: signal.Signals) -> None:
    with ServerProcess(tmp_path, PLAIN) as server:
        model = make_model()
        optimizer = ParameterServerOptimizer(
            model.named_parameters(), server.address, worker="w0", timeout_s=1
        )
        backward(model, [batch(0, 0)])
        optimizer.step()
        os.kill(server.pid, how)
        # one of its threads has to run before the others stop, and meanwhile they may answer
        while state_of(server.pid) not in "TZX":
            time.sleep(0.01)
        started_s = time.monotonic()
        for _ in range(2):
            with pytest.raises(ServerLostError, match=f"{server.address}: no answer within 1 s"):
                optimizer.step()
        assert time.monotonic() - started_s < 12
        with pytest.raises(ServerLostError):
            optimizer.close()
        optimizer.close()


def test_waiting_for_others_is_not_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topq_dist.ps.server.service._SIGN_OF_LIFE_S", 0.2)
    monkeypatch.setattr("topq_dist.ps.server.service._LOOK_S", 0.1)
    with (
        serving(tmp_path, PLAIN, start_workers=2) as server,
        client_of(server, "a", timeout_s=1.0) as (first, of_first),
        client_of(server, "b") as (second, of_second),
    ):
        push(first, of_first, 2, 2, 2, 2)
        waiting = threading.Thread(target=first.finish)
        waiting.start()
        time.sleep(2.5)
        assert waiting.is_alive()
        push(second, of_second, 4, 4, 4, 4)
        second.finish()
        waiting.join(20)
        assert held(first) == [-3, -3, -3, -3]


def test_ctrl_c_ends_waiting_for_others_and_the_step_goes_on_later(tmp_path: Path) -> None:
    model, other = make_model(), make_model()
    with (
        serving(tmp_path, PLAIN, start_workers=2) as server,
        ParameterServerOptimizer(
            model.named_parameters(), str(server.address), q=0.0, worker="a"
        ) as optimizer,
    ):
        backward(model, [batch(0, 0)])
        threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        with ParameterServerOptimizer(
            other.named_parameters(), str(server.address), q=0.0, worker="b"
        ) as second:
            backward(other, [batch(1, 0)])
            side_by_side(2, lambda worker: (optimizer, second)[worker].step())
        assert torch.equal(values(model), values(other))
        assert server.coordinator.status().point.version == 1


def test_a_step_that_one_of_two_servers_failed_is_finished_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The one has applied the push, the other not: neither gets another one in its place."""
    training = {"inner_opt": "sgd", "options": {"lr": 0.1, "momentum": 0.9}}

    def train(one: ServerProcess, two: ServerProcess, *, killed_at: int | None) -> Tensor:
        model = make_model()
        with ParameterServerOptimizer(
            model.named_parameters(),
            [one.address, two.address],
            q=0.7,
            worker="w0",
            timeout_s=2 if killed_at is not None else 20,
        ) as optimizer:
            for step in range(5):
                optimizer.zero_grad()
                backward(model, [batch(0, step)])
                if step != killed_at:
                    optimizer.step()
                    continue
                two.kill()
                with pytest.raises(ServerLostError, match=two.address):
                    optimizer.step()
                two.start()
                optimizer.zero_grad()
                backward(model, [batch(9, 9)])  # not looked at
                optimizer.step()
        return values(model)

    with (
        ServerProcess(tmp_path / "1", training, {"snapshot_every": 3}) as one,
        ServerProcess(tmp_path / "2", training, {"snapshot_every": 3}) as two,
    ):
        first, second = sorted([one, two], key=lambda server: server.address)
        disturbed = train(first, second, killed_at=2)
        assert "finishing the step that was broken off" in caplog.text
    with (
        ServerProcess(tmp_path / "3", training) as three,
        ServerProcess(tmp_path / "4", training) as four,
    ):
        assert torch.equal(train(three, four, killed_at=None), disturbed)


def test_a_worker_past_its_lease_comes_back_and_is_warned_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServerClient, "_keep_lease", lambda self: None)
    with (
        serving(tmp_path, PLAIN, start_workers=2, lease_s=0.5) as server,
        client_of(server, "a") as (first, of_first),
        client_of(server, "b") as (second, of_second),
    ):
        push(second, of_second, 8, 8, 8, 8)
        push(first, of_first, 1, 1, 1, 1)
        first.finish()  # alone, once the other's lease has ended
        assert held(first) == [-1, -1, -1, -1]
        with caplog.at_level(logging.WARNING):
            second.finish()
        assert held(second) == [-1, -1, -1, -1]
        assert len(second.collect().taken_back) == 1
        assert "a push came too late" in caplog.text


def test_a_late_worker_keeps_in_its_residual_what_the_run_went_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServerClient, "_keep_lease", lambda self: None)
    options: Options = {"start_workers": 2, "lease_s": 0.5, "snapshot_every": 2}
    with (
        ServerProcess(tmp_path, PLAIN, options) as server,
        client_of(server, "a") as (first, of_first),
        client_of(server, "b") as (second, of_second),
    ):

        def work(worker: int) -> None:
            (first, second)[worker].finish()

        push(first, of_first, 1, 1, 1, 1)
        push(second, of_second, 8, 8, 8, 8)
        side_by_side(2, work)
        server.kill()
        server.start()
        push(first, of_first, 1, 1, 1, 1)
        first.finish()  # replays alone, once the other's lease has ended
        first.close()  # version 1 is durable, and holds nothing of the other's
        push(second, of_second, 4, 4, 4, 4)
        second.finish()
        assert held(second) == [-1, -1, -1, -1]
        assert [kept.sequence for kept in second.collect().taken_back] == [1, 2]


def test_kept_pushes_survive_saving() -> None:
    pushes = ReplayLog()
    point = ModelVersion(version=1, chain=bytes(range(32)))
    first = pushes.begin(START, NewPush(frames=(memoryview(b"abc"),), lr=(0.1,)))
    pushes.record_applied(first, point, ["a", "b"])
    pushes.begin(point, NewPush(frames=(memoryview(b"defg"),), lr=(0.1,)))
    again = ReplayLog.from_state(pushes.state_dict())
    assert again.state_dict().keys() == pushes.state_dict().keys()
    assert again.pending is not None
    assert again.pending == pushes.pending
    assert again.missing_at(1) == pushes.missing_at(1)
    assert again.missing_at(2) == []
    assert again.first_kept == 1
    assert again.unsent_sequence == 3
    again.forget_durable(1, before=1)
    assert again.first_kept == 1
    again.forget_durable(1, before=2)
    assert again.missing_at(1) is None
    assert [push.sequence for push in again.take_back(1)] == [2]
    assert again.next_sequence == 1


def test_many_workers_in_async_mode_lose_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, {**PLAIN, "mode": "async", "max_staleness": 2}) as server:

        def work(worker: int) -> None:
            with client_of(server, f"w{worker}") as (client, shard):
                pushed = 0
                while pushed < 20:
                    push(client, shard, 1, 2, 3, 4)
                    client.finish()
                    pushed += 1 - len(client.collect().taken_back)
                    shard.clear_residuals()

        side_by_side(4, work)
        with client_of(server, "last") as (client, _):
            assert held(client) == [-80, -160, -240, -320]
