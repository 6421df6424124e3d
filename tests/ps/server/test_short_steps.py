"""A step in one message each way: the same as the stream, and the stream where that is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from ps.servers import Options, serving
from ps_raw import Kept, RawWorker

from topq_dist.ps.client.connection import Connection
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.errors import InvalidError
from topq_dist.ps.protocol.types import (
    MAX_CHUNK_BYTES,
    SHORT_BYTES,
    START,
    Answer,
    ModelVersion,
    PushRecord,
    Update,
    UpdateKind,
)
from topq_dist.ps.security.policy import ClientSecurity
from topq_dist.ps.server.bounded_calls import SharedAnswers
from topq_dist.ps.server.coordinator import Coordinator
from topq_dist.ps.server.process import ParameterServer
from topq_dist.ps.server.push_queue import PendingPush
from topq_dist.ps.server.service import ParameterServerService
from topq_dist.ps.wire import steps
from topq_dist.v1 import parameter_server_pb2 as pb

PLAIN: Options = {"inner_opt": "sgd", "options": {"lr": 1.0}}
DENSE: Options = {**PLAIN, "downlink": "dense"}
CALL_S = 20.0


def full(*payloads: bytes) -> Answer:
    point = ModelVersion(version=1, chain=b"c" * 32)
    update = Update(kind=UpdateKind.FULL, point=point, payloads=tuple(map(memoryview, payloads)))
    return Answer(applied=point, members=("a", "b"), updates=(update,), durable_version=3)


def test_an_answer_goes_through_unless_it_is_too_long() -> None:
    spec = ModelSpec.of([("a", torch.zeros(2)), ("b", torch.zeros(1, dtype=torch.float64))])
    for answer in (full(b"12345678", b"abcdefgh"), replace(full(), updates=())):
        message = steps.short_answer_to_wire(answer)
        assert steps.read_short_answer(message, spec) == answer
    assert steps.read_short_answer(pb.ShortStepResponse(), spec) is None
    for count, fits in ((MAX_CHUNK_BYTES, True), (MAX_CHUNK_BYTES + 1, False)):
        message = steps.short_answer_to_wire(full(bytes(count)))
        assert message.HasField("answer") is fits


def test_a_rounds_answer_is_made_once() -> None:
    shared = SharedAnswers()
    first, other = full(b"12345678"), full(b"abcdefgh")
    made = [shared.short(answer) for answer in (first, replace(first), other, first)]
    assert made[0] is made[1]
    for answer, raw in zip((first, first, other, first), made, strict=True):
        assert raw == steps.short_answer_to_wire(answer).SerializeToString()
    later = shared.short(replace(first, durable_version=4))
    assert pb.ShortStepResponse.FromString(later).answer.durable_version == 4
    too_long = full(bytes(MAX_CHUNK_BYTES + 1))
    assert pb.ShortStepResponse.FromString(shared.short(too_long)) == pb.ShortStepResponse()


def test_an_answer_that_is_none_is_refused() -> None:
    spec = ModelSpec.of([("a", torch.zeros(2))])
    good = steps.short_answer_to_wire(full(b"12345678"))
    for payloads, words in ((b"1234567", "ended after 7 of 8"), (b"123456789", "goes on after")):
        wrong = pb.ShortStepResponse(answer=good.answer, payloads=payloads)
        with pytest.raises(InvalidError, match=words):
            steps.read_short_answer(wrong, spec)
    good.answer.outcome = pb.StepAnswer.OUTCOME_UNSPECIFIED
    with pytest.raises(InvalidError, match="another checksum than it says"):
        steps.read_short_answer(good, spec)
    good.answer.checksum = steps.answer_checksum(good.answer)
    with pytest.raises(InvalidError, match="outcome 0"):
        steps.read_short_answer(good, spec)


@dataclass
class Pair:
    """Two workers of a run, each with its connection and what the server has counted of calls."""

    server: ParameterServer
    workers: list[RawWorker]
    connections: list[Connection]
    calls: list[str]

    def step(self, place: int, value: float) -> Answer:
        """Step as a worker does whose gradient is `value` everywhere."""
        worker = self.workers[place]
        push = worker.push_of([torch.full((worker.spec.numel,), value)])
        answer = self.send(place, push)
        worker.take(push, answer)
        return answer

    def send(self, place: int, push: Kept) -> Answer:
        """Send a push over the worker's connection."""
        worker = self.workers[place]
        kept = PushRecord(
            sequence=push.sequence,
            base=push.base,
            frames=tuple(push.frames),
            lr=(),
            digest=push.digest,
        )
        connection = self.connections[place]
        return connection.step(worker.id, kept, worker.spec, CALL_S, lambda: None)

    def both(self, *values: float) -> None:
        """Step with both at once."""
        other = threading.Thread(target=self.step, args=(1, values[1]))
        other.start()
        self.step(0, values[0])
        other.join(CALL_S)

    def held(self, place: int) -> float:
        """Return the first value of the model, as this worker has it."""
        return float(self.workers[place].held.flats[0][0])


class _Names(grpc.ServerInterceptor):
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def intercept_service(self, continuation, details):  # type: ignore[no-untyped-def]
        self._calls.append(details.method.rpartition("/")[2])
        return continuation(details)


@pytest.fixture
def pair(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Pair]:
    """Two workers that have joined; the parameter is (training, number of elements)."""
    training, numel = request.param
    calls: list[str] = []
    monkeypatch.setattr("ps.servers.ParameterServer", _server_that_notes(calls))
    with serving(tmp_path, training, start_workers=2) as server:
        model = {"w": torch.zeros(numel)}
        workers = [RawWorker(name, model, str(server.address)) for name in ("a", "b")]
        connections = [Connection(str(server.address), ClientSecurity()) for _ in workers]
        for worker in workers:
            worker.join()
        calls.clear()
        yield Pair(server=server, workers=workers, connections=connections, calls=calls)
        for connection, worker in zip(connections, workers, strict=True):
            connection.close()
            worker.channel.close()


def _server_that_notes(calls: list[str]):  # type: ignore[no-untyped-def]
    def make(*arguments: object, **options: object) -> ParameterServer:
        return ParameterServer(*arguments, interceptors=[_Names(calls)], **options)  # type: ignore[arg-type]

    return make


def ways(calls: Sequence[str]) -> list[str]:
    return [call for call in calls if call.endswith("Step")]


@pytest.mark.parametrize("pair", [(PLAIN, 4)], indirect=True)
def test_short_steps_follow_a_short_answer(pair: Pair) -> None:
    for _ in range(3):
        pair.both(1.0, 3.0)
    assert ways(pair.calls) == ["Step", "Step", *["ShortStep"] * 4]
    assert pair.held(0) == pair.held(1) == -6.0


@pytest.mark.parametrize("pair", [(DENSE, SHORT_BYTES // 4 + 1)], indirect=True)
def test_a_long_answer_keeps_to_streams(pair: Pair) -> None:
    pair.both(1.0, 3.0)
    pair.both(1.0, 3.0)
    assert ways(pair.calls) == ["Step"] * 4
    assert pair.held(0) == pair.held(1) == -4.0


@pytest.mark.parametrize("pair", [(DENSE, MAX_CHUNK_BYTES // 4 + 1)], indirect=True)
def test_an_answer_too_long_for_a_message_comes_as_a_stream_and_is_applied_once(pair: Pair) -> None:
    # as if the last answer had been short; a gradient that is zero everywhere is, too
    pair.connections[0]._short_answers = True
    worker = pair.workers[0]
    nothing = worker.push_of([])
    other = threading.Thread(target=pair.step, args=(1, 3.0))
    other.start()
    answer = pair.send(0, nothing)
    other.join(CALL_S)
    worker.take(nothing, answer)
    assert sorted(ways(pair.calls)) == ["ShortStep", "Step", "Step"]
    assert pair.held(0) == pair.held(1) == -3.0
    status = pair.server.coordinator.status()
    assert status.point.version == 1
    assert status.sent_bytes == 2 * worker.spec.raw_bytes  # the one that was too long did not go


@pytest.mark.parametrize("way", ["Step", "ShortStep"])
@pytest.mark.parametrize("pair", [(DENSE, 4)], indirect=True)
def test_an_answer_to_nobody_is_not_counted_as_sent(
    pair: Pair, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator, worker = pair.server.coordinator, pair.workers[0]
    calls: list[Any] = []
    noted = threading.Event()

    def wait_and_lose(pending: PendingPush, *times: float, is_active: Callable[[], bool]) -> object:
        answer = Coordinator.wait(coordinator, pending, *times, is_active=is_active)
        if pending.worker == "a" and isinstance(answer, Answer):
            calls[0].cancel()
            while is_active():
                time.sleep(0.01)
        return answer

    note_sent = ParameterServerService._note_sent

    def note_and_say(service: ParameterServerService, name: str, *words: Any) -> None:
        note_sent(service, name, *words)
        if name == "a":
            noted.set()

    monkeypatch.setattr(coordinator, "wait", wait_and_lose)
    monkeypatch.setattr(ParameterServerService, "_note_sent", note_and_say)
    push = worker.push_of([torch.ones(4)])
    if way == "Step":
        calls.append(worker.stub.Step(steps.step_requests(worker.id, push.record())))
    else:
        calls.append(
            worker.stub.ShortStep.future(steps.short_step_request(worker.id, push.record()))
        )
    pair.step(1, 3.0)
    assert noted.wait(CALL_S)
    status = coordinator.status()
    assert [one.version for one in status.workers] == [0, 1]
    assert [one.sent_bytes for one in status.workers] == [0, worker.spec.raw_bytes]
    assert status.sent_bytes == coordinator.totals.sent_dense_bytes == worker.spec.raw_bytes


@pytest.mark.parametrize("pair", [(PLAIN, 4)], indirect=True)
def test_a_round_that_takes_long_is_waited_for_by_stream(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.both(1.0, 3.0)
    monkeypatch.setattr("topq_dist.ps.server.service._SIGN_OF_LIFE_S", 0.2)
    pair.calls.clear()
    first = threading.Thread(target=pair.step, args=(0, 1.0))
    first.start()
    while ways(pair.calls) != ["ShortStep", "Step"]:
        first.join(0.02)
        assert first.is_alive()
    pair.step(1, 3.0)
    first.join(CALL_S)
    assert pair.held(0) == pair.held(1) == -4.0
    pair.both(1.0, 3.0)
    # the one that waited goes on as it did, and the other with messages
    assert sorted(ways(pair.calls)) == ["ShortStep", "ShortStep", "ShortStep", "Step", "Step"]


@pytest.mark.parametrize("pair", [(PLAIN, 4)], indirect=True)
def test_what_is_no_push_is_refused_and_leaves_nothing(pair: Pair) -> None:
    worker = pair.workers[0]
    push = worker.push_of([torch.ones(4)])
    request = steps.short_step_request(worker.id, push.record())
    before = pair.server.coordinator.status(state_sha256=True)
    altered = bytearray(request.frames)
    altered[-1] ^= 1
    other_worker = pb.WorkerId(run=worker.id.run, worker="c", epoch=1)
    for field, value, code, words in (
        ("frames", request.frames[:-1], grpc.StatusCode.INVALID_ARGUMENT, "ended after"),
        ("frames", request.frames + b"1", grpc.StatusCode.INVALID_ARGUMENT, "goes on after"),
        ("frames", b"", grpc.StatusCode.INVALID_ARGUMENT, "ended after 0"),
        ("frames", bytes(altered), grpc.StatusCode.INVALID_ARGUMENT, "damaged"),
        ("header", pb.StepHeader(), grpc.StatusCode.INVALID_ARGUMENT, "worker=''"),
        ("header.sequence", 7, grpc.StatusCode.OUT_OF_RANGE, "expected push 1"),
        ("header.id", other_worker, grpc.StatusCode.FAILED_PRECONDITION, "has not joined"),
    ):
        wrong = pb.ShortStepRequest()
        wrong.CopyFrom(request)
        *path, name = field.split(".")
        part = wrong.header if path else wrong
        if isinstance(value, pb.StepHeader | pb.WorkerId):
            getattr(part, name).CopyFrom(value)
        else:
            setattr(part, name, value)
        wrong.header.header_digest = steps.header_digest(wrong.header)
        with pytest.raises(grpc.RpcError) as refused:
            worker.stub.ShortStep(wrong, timeout=CALL_S)
        assert isinstance(refused.value, grpc.Call)
        assert refused.value.code() is code
        assert words in str(refused.value.details())
    after = pair.server.coordinator.status(state_sha256=True)
    assert after.state_sha256 == before.state_sha256
    assert sum(after.refused.values()) == 7
    assert [view.waiting for view in after.workers] == [False, False]


def test_the_messages_of_a_push_say_the_same() -> None:
    frames = [memoryview(b"abc"), memoryview(b""), memoryview(b"defg")]
    push = PushRecord(
        sequence=3, base=START, frames=tuple(frames), lr=(0.5,), digest=b"d" * 32, members=("a",)
    )
    short = steps.short_step_request(pb.WorkerId(worker="w"), push)
    messages = list(steps.step_requests(pb.WorkerId(worker="w"), push))
    assert messages == [pb.StepRequest(header=short.header), memoryview(short.frames)]
