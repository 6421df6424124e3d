"""Clients that hold on to what a server has: its threads, its memory, its names."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from ps_raw import RawWorker

from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig
from topq_dist.ps.protocol.errors import TooManyWorkersError
from topq_dist.ps.protocol.types import Push
from topq_dist.ps.security.policy import ServerSecurity
from topq_dist.ps.server import interceptor
from topq_dist.ps.server.process import ParameterServer
from topq_dist.ps.state import ledger
from topq_dist.ps.state.ledger import Ledger
from topq_dist.ps.wire import codec, messages, steps
from topq_dist.ps.wire.messages import Calls
from topq_dist.v1 import parameter_server_pb2 as pb

SERVICE = "/topq_dist.v1.ParameterServer"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
HEALTH = "/grpc.health.v1.Health"
TOKENS = {name: name[0] * 32 for name in ("alice", "mallory")}
MAX_WORKERS = 2
THREADS = 2 * MAX_WORKERS + 16
# 12 MB: more than what fits between a server and a client that does not read
NUMEL = 3_000_000
GRACE_S = 1.0


@contextmanager
def server_of(folder: Path, *, tokens: bool, **serving: Any) -> Iterator[ParameterServer]:
    path = folder / "tokens"
    path.touch(0o600)
    path.write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()))
    server = ParameterServer(
        TrainingConfig(inner_opt="sgd"),
        ServingConfig(**{"max_workers": MAX_WORKERS} | serving),
        state_dir=folder / "state",
        address="127.0.0.1:0",
        security=ServerSecurity(tokens=path if tokens else None),
    )
    try:
        yield server
    finally:
        server.stop()


def bearer(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {TOKENS[name]}"),)


class Silence:
    """Requests that never come, until it is over."""

    def __init__(self) -> None:
        self._over = threading.Event()

    def after(self, *messages: bytes) -> Iterator[bytes]:
        yield from messages
        self._over.wait(60)

    def end(self) -> None:
        self._over.set()


@pytest.fixture
def silence() -> Iterator[Silence]:
    silence = Silence()
    yield silence
    silence.end()


def channel_to(server: ParameterServer) -> grpc.Channel:
    return grpc.insecure_channel(
        str(server.address), options=[("grpc.use_local_subchannel_pool", 1)]
    )


def status(channel: grpc.Channel, name: str = "alice") -> pb.StatusResponse:
    stub = Calls(channel)
    return stub.Status(pb.StatusRequest(), timeout=5, metadata=bearer(name))


def healthy(channel: grpc.Channel) -> bool:
    check: Any = channel.unary_unary(f"{HEALTH}/Check")
    return bool(check(b"", timeout=5) == b"\x08\x01")


def until(true: Callable[[], bool], limit_s: float = 10.0) -> bool:
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        try:
            if true():
                return True
        except grpc.RpcError:
            pass
        time.sleep(0.05)
    return False


METHODS = [
    f"{SERVICE}/Step",
    f"{SERVICE}/Upload",
    f"{SERVICE}/Status",
    f"{SERVICE}/Join",
    f"{SERVICE}/Fetch",
    REFLECTION,
]


@pytest.mark.parametrize("method", METHODS)
def test_strangers_who_say_nothing_get_no_thread(
    tmp_path: Path, silence: Silence, method: str
) -> None:
    with server_of(tmp_path, tokens=True) as server, channel_to(server) as channel:
        open_call: Any = channel.stream_stream(method)
        calls = [open_call(silence.after()) for _ in range(2 * THREADS)]
        assert until(lambda: not any(call.is_active() for call in calls), 3)
        codes = {call.code() for call in calls}
        known = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert grpc.StatusCode.UNAUTHENTICATED in codes <= known
        assert healthy(channel)
        assert status(channel).refused["unauthenticated"] > 0
        silence.end()


@pytest.mark.parametrize("method", [*METHODS, f"{HEALTH}/Watch"])
def test_one_holder_of_a_token_leaves_threads_to_the_others(
    tmp_path: Path, silence: Silence, method: str
) -> None:
    with (
        server_of(tmp_path, tokens=True) as server,
        channel_to(server) as bad,
        channel_to(server) as good,
    ):
        open_call: Any = bad.stream_stream(method)
        if method.startswith(HEALTH):
            calls = [open_call(silence.after(b"")) for _ in range(2 * THREADS)]
            assert until(lambda: not any(call.is_active() for call in calls), 3)
        else:
            calls = [
                open_call(silence.after(), metadata=bearer("mallory")) for _ in range(2 * THREADS)
            ]
            assert until(lambda: sum(call.is_active() for call in calls) == 8, 3)
        assert until(lambda: healthy(good) and status(good) is not None, 3)
        if not method.startswith(HEALTH):
            assert status(good).refused["too_many_calls"] > 0
            with pytest.raises(grpc.RpcError, match="'mallory' has 8 calls under way"):
                status(good, "mallory")
        silence.end()


@pytest.mark.parametrize("method", [*METHODS, f"{HEALTH}/Check"])
def test_silence_ends_a_call_where_there_are_no_tokens(
    tmp_path: Path, silence: Silence, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptor, "GRACE_S", GRACE_S)
    with server_of(tmp_path, tokens=False) as server, channel_to(server) as channel:
        open_call: Any = channel.stream_stream(method)
        calls = [open_call(silence.after()) for _ in range(THREADS)]
        assert until(lambda: not any(call.is_active() for call in calls), 5)
        assert {call.code() for call in calls} == {grpc.StatusCode.CANCELLED}
        assert until(lambda: healthy(channel))
        assert dict(status(channel).refused) == {"too_slow": THREADS}
        silence.end()


def worker_of(server: ParameterServer, numel: int = NUMEL) -> RawWorker:
    return RawWorker("alice", {"w": torch.ones(numel)}, str(server.address))


def test_a_push_that_trickles_in_is_ended_and_the_worker_may_push_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptor, "GRACE_S", GRACE_S)
    with server_of(tmp_path, tokens=False) as server:
        worker = worker_of(server)
        worker.join()
        push = worker.push_of([torch.ones(NUMEL)])

        def trickle() -> Iterator[pb.StepRequest | memoryview]:
            header, *_ = steps.step_requests(worker.id, push.record())
            yield header
            chunk = push.frames[0]
            for place in range(1000):
                time.sleep(0.05)
                yield chunk[place : place + 1]

        started_s = time.monotonic()
        with pytest.raises(grpc.RpcError) as ended:
            list(worker.stub.Step(trickle(), timeout=30))
        assert isinstance(ended.value, grpc.Call)
        assert ended.value.code() is grpc.StatusCode.CANCELLED
        assert GRACE_S / 2 < time.monotonic() - started_s < 5
        assert dict(status(worker.channel).refused) == {"too_slow": 1}
        assert worker.send(push).applied is not None
        worker.close()


def test_answers_that_nobody_reads_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptor, "GRACE_S", GRACE_S)
    monkeypatch.setattr(interceptor, "LEAST_RATE_BYTES_S", 1 << 40)
    with server_of(tmp_path, tokens=False) as server:
        worker = worker_of(server)
        worker.join()
        push = worker.push_of([torch.ones(NUMEL)])
        requests = steps.step_requests(worker.id, push.record())
        request = pb.FetchRequest(id=worker.id, which=pb.FetchRequest.WHICH_CENTRAL)
        calls: list[Any] = [worker.stub.Step(requests), worker.stub.Fetch(request)]
        # on a loaded machine a question is too slow as well, now and then
        slow: list[grpc.RpcError] = []

        def too_slow() -> int:
            try:
                return int(status(worker.channel).refused.get("too_slow", 0))
            except grpc.RpcError as error:
                slow.append(error)
                raise

        assert until(lambda: too_slow() >= len(calls) + len(slow))
        for call in calls:
            with pytest.raises(grpc.RpcError):
                list(call)
        # it was applied nevertheless, and is answered again
        assert worker.send(push).applied is not None
        assert server.coordinator.status().point.version == 1
        worker.close()


def test_health_does_not_keep_those_who_would_watch(tmp_path: Path) -> None:
    with server_of(tmp_path, tokens=False) as server, channel_to(server) as channel:
        watch: Any = channel.unary_stream(f"{HEALTH}/Watch")
        with pytest.raises(grpc.RpcError, match="ask Check") as refused:
            list(watch(b"", timeout=5))
        assert isinstance(refused.value, grpc.Call)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


class TestNames:
    def push(self, worker: str) -> Push:
        return Push(
            worker=worker,
            epoch=1,
            sequence=1,
            base=messages.point_from_wire(pb.Point(chain=bytes(32))),
            frames=(),
            lr=(),
            digest=bytes(32),
        )

    def test_there_are_only_so_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledger, "MOST_WORKERS", 3)
        held = Ledger()
        for name in "abc":
            held.join(name, name.encode() * 16, 0, 0)
        held.record(1, [self.push("a")])
        with pytest.raises(
            TooManyWorkersError, match="'d' is one too many in a run that has had 3"
        ):
            held.join("d", bytes(16), 0, 0)
        held.make_room(["b"])
        assert held.workers == ("a", "b")  # what "a" pushed must not be applied again
        held.join("d", bytes(16), 0, 0)
        assert Ledger.from_json(held.to_json()).workers == ("a", "b", "d")

    def test_one_that_says_that_it_has_pushed_elsewhere_is_forgotten_as_well(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ledger, "MOST_WORKERS", 3)
        held = Ledger()
        held.join("a", b"a" * 16, 1, 1)
        held.join("b", b"b" * 16, 1, 7)
        held.join("c", b"c" * 16, 1, 7)
        held.record(1, [self.push("a"), replace(self.push("b"), sequence=7)])
        held = Ledger.from_json(held.to_json())
        held.make_room([])
        assert held.workers == ("a", "b")
        tree = held.to_json()
        tree["workers"]["b"]["first_sequence"] = 8
        with pytest.raises(ValueError, match="for numbers from 8 on before 8"):
            Ledger.from_json(tree)

    @pytest.mark.parametrize("next_sequence", [0, 2])
    def test_a_flood_of_them_takes_no_honest_workers_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, next_sequence: int
    ) -> None:
        monkeypatch.setattr(ledger, "MOST_WORKERS", 20)
        with server_of(tmp_path, tokens=False, max_workers=4) as server:
            alice = worker_of(server, 10)
            alice.join()
            alice.step([torch.ones(10)])
            spec = codec.spec_to_wire(ModelSpec.of(alice.model.items()))
            for number in range(50):
                joined = alice.stub.Join(
                    pb.JoinRequest(
                        worker=f"x{number}",
                        instance=secrets.token_bytes(16),
                        next_sequence=next_sequence,
                        model=spec,
                    ),
                    timeout=10,
                )
                alice.stub.Leave(pb.LeaveRequest(id=joined.id), timeout=10)
            assert len(server.coordinator._ledger.workers) <= 20
            answer = alice.step([torch.ones(10)])
            assert answer.applied is not None
            assert answer.applied.version == 2
            alice.close()

    def test_an_epoch_at_the_end_of_the_numbers_does_not_lock_its_worker_out(self) -> None:
        held = Ledger()
        held.join("a", b"x" * 16, 2**62, 2**62)
        entry = held.join("a", b"y" * 16, 0, 0)
        assert entry.epoch == 2**62 + 1
        assert held.join("a", b"y" * 16, entry.epoch, 2**62 + 9) == entry


def test_a_model_beyond_all_memory_is_too_large(tmp_path: Path) -> None:
    with (
        server_of(tmp_path, tokens=False, max_model_bytes=2**52) as server,
        channel_to(server) as channel,
    ):
        stub = Calls(channel)
        joined = stub.Join(
            pb.JoinRequest(
                worker="alice",
                instance=secrets.token_bytes(16),
                model=[pb.TensorSpec(name="w", shape=[2**47], dtype="float32")],
            ),
            timeout=10,
        )
        with pytest.raises(grpc.RpcError, match="more than there is memory") as refused:
            stub.Upload(iter([pb.UploadRequest(id=joined.id)]), timeout=10)
        assert isinstance(refused.value, grpc.Call)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


class TestWhoBringsTheModel:
    """The first to join says what the model is, and might never bring it."""

    def join(self, stub: Calls, worker: str, numel: int) -> pb.JoinResponse:
        tensor = pb.TensorSpec(name="w", shape=[numel], dtype="float32")
        request = pb.JoinRequest(worker=worker, instance=secrets.token_bytes(16), model=[tensor])
        return stub.Join(request, timeout=10)

    def test_one_that_is_damaged_on_its_way_is_brought_again(self, tmp_path: Path) -> None:
        with server_of(tmp_path, tokens=False) as server, channel_to(server) as channel:
            stub = Calls(channel)
            joined = self.join(stub, "alice", 10)
            brought, damaged = memoryview(bytes(40)), memoryview(bytes([*bytes(39), 1]))
            first, _ = codec.upload_requests(joined.id, [brought])
            with pytest.raises(grpc.RpcError, match="another checksum than was said"):
                stub.Upload(iter([first, damaged]), timeout=5)
            joined = self.join(stub, "alice", 10)
            assert joined.upload
            stub.Upload(codec.upload_requests(joined.id, [brought]), timeout=5)
            assert server.coordinator.status().numel == 10

    def test_who_is_gone_is_replaced_whatever_model_he_named(self, tmp_path: Path) -> None:
        with (
            server_of(tmp_path, tokens=False, lease_s=0.5) as server,
            channel_to(server) as channel,
        ):
            stub = Calls(channel)
            assert self.join(stub, "mallory", 7).upload
            with pytest.raises(grpc.RpcError, match="has shape"):
                self.join(stub, "alice", 10)
            time.sleep(0.6)
            assert self.join(stub, "alice", 10).upload

    def test_who_does_not_begin_is_replaced_though_the_lease_runs(self, tmp_path: Path) -> None:
        with (
            server_of(tmp_path, tokens=False, lease_s=0.3) as server,
            channel_to(server) as channel,
        ):
            stub = Calls(channel)
            idle = self.join(stub, "mallory", 7)

            def honest_joins() -> bool:
                stub.Renew(pb.RenewRequest(id=idle.id), timeout=5)
                return self.join(stub, "alice", 10).upload

            assert until(honest_joins)
            with pytest.raises(grpc.RpcError, match="'alice' brings the model"):
                stub.Upload(codec.upload_requests(idle.id, [memoryview(bytes(28))]), timeout=5)
