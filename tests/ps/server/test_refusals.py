"""Refusals of a server: with which status, in which words, counted how, and without a trace."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from ps.strangers import CALL_S, TOKENS, Place, Worker, gradients, guarded, model
from ps_raw import Kept
from torch import Tensor

from topq_dist.compress.codec.frame import encode_frame, encode_non_finite_frame
from topq_dist.compress.codec.header import read_header, write_header
from topq_dist.compress.codec.values import quantize
from topq_dist.ps.client.probe import NoAnswerError, ask_status
from topq_dist.ps.protocol.errors import REASON_KEY
from topq_dist.ps.protocol.types import push_digest
from topq_dist.ps.security.policy import ClientSecurity
from topq_dist.ps.security.tls import ClientTls
from topq_dist.ps.wire import codec, steps
from topq_dist.v1 import parameter_server_pb2 as pb

LONGEST_MESSAGE = 2_000
SERVICE = "/topq_dist.v1.ParameterServer"


@dataclass(kw_only=True)
class Run:
    """A server with a few versions behind it; `zombie` held alice's name before alice did."""

    place: Place
    alice: Worker
    zombie: Worker
    applied: list[Kept]

    def bob(self, named: dict[str, Tensor] | None = None) -> Worker:
        """Return a worker with a right to his name and no place in the run, who says he has."""
        bob = self.place.worker("bob", named)
        bob.id = pb.WorkerId(run=self.alice.id.run, worker="bob", epoch=1)
        bob.point = self.alice.point
        return bob

    def as_alice(self, token: str | None) -> Worker:
        """Return one who says that he is alice, and has `token`."""
        other = Worker("alice", self.place.channel(token))
        other.id, other.point = self.alice.id, self.alice.point
        other.sequence = self.alice.sequence
        return other

    def step(self) -> None:
        """Have alice step."""
        push = self.alice.next_push()
        answer = self.alice.send(push)
        assert answer.applied is not None
        self.alice.take(push, answer)
        self.applied.append(push)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with guarded(tmp_path_factory.mktemp("guarded")) as place:
        zombie, alice = place.worker("alice"), place.worker("alice")
        zombie.join()
        alice.join()
        made = Run(place=place, alice=alice, zombie=zombie, applied=[])
        for _ in range(3):
            made.step()
        yield made
        # nobody can fill the server's log, and it ends in good order
        assert place.served.stop() == (0, "", "")


Act = Callable[[Run], object]


def refused_by(run: Run, act: Act) -> grpc.Call:
    before = run.place.status()
    with pytest.raises(grpc.RpcError) as caught:
        act(run)
    after = run.place.status()
    assert after.state_sha256 == before.state_sha256 != ""
    assert after.point == before.point
    assert [worker.worker for worker in after.workers] == ["alice"]
    error = caught.value
    assert isinstance(error, grpc.Call)
    reasons = [value for key, value in error.trailing_metadata() or () if key == REASON_KEY]
    counted = {
        reason: count - before.refused.get(reason, 0)
        for reason, count in after.refused.items()
        if count != before.refused.get(reason, 0)
    }
    assert counted == {str(reason): 1 for reason in reasons}
    run.step()
    return error


def check(run: Run, act: Act, code: str, reason: str, words: tuple[str, ...]) -> None:
    error = refused_by(run, act)
    details = error.details() or ""
    assert error.code().name == code, details
    reasons = [value for key, value in error.trailing_metadata() or () if key == REASON_KEY]
    assert reasons == [reason], details
    for word in words:
        assert word in details
    assert len(details) <= LONGEST_MESSAGE


# who speaks

CALLS: dict[str, Callable[[Worker], object]] = {
    "join": lambda worker: worker.join(),
    "upload": lambda worker: worker.stub.Upload(
        codec.upload_requests(worker.id, worker.held.raw()), timeout=CALL_S
    ),
    "step": lambda worker: worker.send(worker.next_push()),
    "short step": lambda worker: worker.stub.ShortStep(
        pb.ShortStepRequest(header=worker.header(worker.next_push())), timeout=CALL_S
    ),
    "fetch": lambda worker: worker.fetch(),
    "renew": lambda worker: worker.stub.Renew(pb.RenewRequest(id=worker.id), timeout=CALL_S),
    "leave": lambda worker: worker.stub.Leave(pb.LeaveRequest(id=worker.id), timeout=CALL_S),
}
IN_A_NAME = pytest.mark.parametrize("call", CALLS)


@IN_A_NAME
def test_no_token(run: Run, call: str) -> None:
    words = ("no token", "authorization: Bearer")
    check(
        run,
        lambda run: CALLS[call](run.as_alice(None)),
        "UNAUTHENTICATED",
        "unauthenticated",
        words,
    )


@IN_A_NAME
def test_an_unknown_token(run: Run, call: str) -> None:
    words = ("unknown token", "tokens file")
    check(
        run,
        lambda run: CALLS[call](run.as_alice("x" * 32)),
        "UNAUTHENTICATED",
        "unauthenticated",
        words,
    )


@IN_A_NAME
def test_another_workers_token(run: Run, call: str) -> None:
    words = ("worker='alice'", "is of 'bob'")
    check(
        run,
        lambda run: CALLS[call](run.as_alice(TOKENS["bob"])),
        "PERMISSION_DENIED",
        "permission_denied",
        words,
    )


@pytest.mark.parametrize("token", [None, "x" * 32])
def test_status_wants_a_token_too(run: Run, token: str | None) -> None:
    def ask(run: Run) -> None:
        run.as_alice(token).stub.Status(pb.StatusRequest(), timeout=CALL_S)

    check(run, ask, "UNAUTHENTICATED", "unauthenticated", ("token",))


def test_wrong_certificates_do_not_get_through_the_handshake(run: Run) -> None:
    place = run.place
    expired = place.ours.issue("expired", server=False, days=-1)
    foreign = place.foreign.issue("client", server=False)
    channels = {
        "wrong CA at the client": place.channel(TOKENS["alice"], ca=place.foreign.certificate),
        "wrong CA at the server": place.channel(TOKENS["alice"], pair=foreign),
        "expired": place.channel(TOKENS["alice"], pair=expired),
        "none": place.channel_without_certificate(TOKENS["alice"]),
    }
    for name, channel in channels.items():
        error = refused_by(run, lambda run, to=channel: CALLS["renew"](speaker(run, to)))  # type: ignore[misc]
        assert error.code() is grpc.StatusCode.UNAVAILABLE, name


def speaker(run: Run, channel: grpc.Channel) -> Worker:
    worker = Worker("alice", channel)
    worker.id = run.alice.id
    return worker


def test_people_are_told_what_is_wrong_with_their_certificates(run: Run) -> None:
    place = run.place
    pair, foreign = place.pair, place.foreign.issue("client", server=False)
    expired = place.ours.issue("expired", server=False, days=-1)
    ca, other_ca = place.ours.certificate, place.foreign.certificate
    cases = [
        (ClientTls(ca=other_ca, certificate=pair.certificate, key=pair.key), "does not hold"),
        (ClientTls(ca=ca, certificate=foreign.certificate, key=foreign.key), "does not take"),
        (ClientTls(ca=ca), "without certificate"),
        (None, "speaks TLS"),
    ]
    for tls, words in cases:
        security = ClientSecurity(tls=tls)
        with pytest.raises(NoAnswerError, match=words):
            ask_status(place.served.address, security, timeout_s=10)
    late = ClientTls(ca=ca, certificate=expired.certificate, key=expired.key)
    with pytest.raises(ValueError, match="expired"):
        ask_status(place.served.address, ClientSecurity(tls=late), timeout_s=10)


# what is in a push


class Pushed:
    """Sends alice's next push with some changes of its frames, its lr or header."""

    def __init__(self, **changes: Any) -> None:
        self._changes = changes

    def __call__(self, run: Run) -> None:
        header, chunks = self._push(run)
        run.alice.send_messages([pb.StepRequest(header=header), *chunks])

    def in_one_message(self, run: Run) -> None:
        """Do the same by ShortStep."""
        header, chunks = self._push(run)
        request = pb.ShortStepRequest(header=header, frames=b"".join(chunks))
        run.alice.stub.ShortStep(request, timeout=CALL_S)

    def _push(self, run: Run) -> tuple[pb.StepHeader, list[memoryview]]:
        changes = dict(self._changes)
        frames_of, lr = changes.pop("frames_of", None), changes.pop("lr", ())
        push = run.alice.next_push()
        if frames_of is not None:
            push = replace(push, frames=frames_of(push.frames))
        _, *chunks = run.alice.messages(push, lr)
        header = run.alice.header(push, lr=lr, digest=push_digest(lr, push.frames))
        for name, value in changes.items():
            set_field(header, name, value)
        header.header_digest = steps.header_digest(header)
        return header, [chunk for chunk in chunks if isinstance(chunk, memoryview)]


def set_field(header: pb.StepHeader, name: str, value: Any) -> None:
    header.ClearField(name)  # type: ignore[arg-type]
    if isinstance(value, list):
        getattr(header, name).extend(value)
    elif isinstance(value, pb.Point | pb.WorkerId):
        getattr(header, name).CopyFrom(value)
    else:
        setattr(header, name, value)


def altered(frames: list[memoryview]) -> list[memoryview]:
    damaged = bytearray(frames[0])
    damaged[-1] ^= 1
    return [memoryview(bytes(damaged)), *frames[1:]]


def of_numel(numel: int) -> list[memoryview]:
    frame = encode_frame(numel, torch.arange(numel), quantize(torch.ones(numel)))
    other = encode_frame(3, torch.arange(3), quantize(torch.ones(3)))
    return [frame.numpy().data, other.numpy().data]


def holding(value: float) -> list[memoryview]:
    frames = of_numel(10)
    frame = np.frombuffer(frames[0], dtype=np.uint8).copy()
    header = read_header(frame)
    frame[-4:] = np.array([value], dtype="<f4").view(np.uint8)
    write_header(header, frame)
    return [frame.data, frames[1]]


def truncated(run: Run) -> None:
    header, chunk = run.alice.messages(run.alice.next_push())
    assert isinstance(chunk, memoryview)
    run.alice.send_messages([header, chunk[:-1]])


def without_bytes(run: Run) -> None:
    header, _ = run.alice.messages(run.alice.next_push())
    run.alice.send_messages([header])


def too_many_bytes(run: Run) -> None:
    messages = run.alice.messages(run.alice.next_push())
    run.alice.send_messages([*messages, pb.StepRequest(chunk=b"x")])


def chunk_of(size: int) -> Act:
    def act(run: Run) -> None:
        header, _ = run.alice.messages(run.alice.next_push())
        run.alice.send_messages([header, pb.StepRequest(chunk=bytes(size))])

    return act


def empty_chunk(run: Run) -> None:
    header, chunk = run.alice.messages(run.alice.next_push())
    run.alice.send_messages([header, pb.StepRequest(chunk=b""), chunk])


def damaged_on_its_way(run: Run) -> None:
    header, chunk = run.alice.messages(run.alice.next_push())
    assert isinstance(chunk, memoryview)
    damaged = bytearray(chunk)
    damaged[40] ^= 4
    run.alice.send_messages([header, pb.StepRequest(chunk=bytes(damaged))])


def two_headers(run: Run) -> None:
    header, chunk = run.alice.messages(run.alice.next_push())
    run.alice.send_messages([header, header, chunk])


def chunk_first(run: Run) -> None:
    header, chunk = run.alice.messages(run.alice.next_push())
    run.alice.send_messages([chunk, header])


def nothing(run: Run) -> None:
    run.alice.send_messages([])


def empty_message(run: Run) -> None:
    run.alice.send_messages([pb.StepRequest()])


def non_finite(frames: list[memoryview]) -> list[memoryview]:
    return [encode_non_finite_frame(10).numpy().data, *frames[1:]]


def one_frame(frames: list[memoryview]) -> list[memoryview]:
    return frames[:1]


def empty_frame(frames: list[memoryview]) -> list[memoryview]:
    return [memoryview(b""), *frames[1:]]


BAD_PUSHES: dict[str, tuple[Act, str, str, tuple[str, ...]]] = {
    "declared beyond the limit": (
        Pushed(frame_bytes=[2**40, 1]),
        "RESOURCE_EXHAUSTED",
        "too_large",
        ("'alice'", str(2**40 + 1), "expected at most"),
    ),
    "declared beyond any number": (
        Pushed(frame_bytes=[2**64 - 1, 2**64 - 1]),
        "RESOURCE_EXHAUSTED",
        "too_large",
        ("expected at most",),
    ),
    "more bytes than declared": (too_many_bytes, "INVALID_ARGUMENT", "invalid", ("goes on after",)),
    "a long chunk": (chunk_of(3 << 20), "INVALID_ARGUMENT", "invalid", (str(3 << 20), "at most")),
    "fewer bytes": (truncated, "INVALID_ARGUMENT", "damaged", ("ended after", "of")),
    "no bytes": (without_bytes, "INVALID_ARGUMENT", "damaged", ("ended after 0 of",)),
    "damaged": (damaged_on_its_way, "INVALID_ARGUMENT", "damaged", ("damaged on its way",)),
    "altered": (Pushed(frames_of=altered), "INVALID_ARGUMENT", "invalid", ("frame 0", "checksum")),
    "wrong numel": (
        Pushed(frames_of=lambda _: of_numel(11)),
        "INVALID_ARGUMENT",
        "invalid",
        ("frame 0", "11 elements", "expected 10"),
    ),
    "one frame": (
        Pushed(frames_of=one_frame),
        "INVALID_ARGUMENT",
        "invalid",
        ("1 frames", "expected 2"),
    ),
    "an empty frame": (Pushed(frames_of=empty_frame), "INVALID_ARGUMENT", "invalid", ("frame 0",)),
    "many frames": (
        Pushed(frame_bytes=[0] * 1_000_000),
        "INVALID_ARGUMENT",
        "invalid",
        ("1000000 frames", "expected 2"),
    ),
    "non-finite": (Pushed(frames_of=non_finite), "INVALID_ARGUMENT", "non_finite", ("NaN",)),
    "NaN": (
        Pushed(frames_of=lambda _: holding(np.nan)),
        "INVALID_ARGUMENT",
        "invalid",
        ("finite",),
    ),
    "infinity": (
        Pushed(frames_of=lambda _: holding(np.inf)),
        "INVALID_ARGUMENT",
        "invalid",
        ("finite",),
    ),
    "lr NaN": (Pushed(lr=(float("nan"),)), "INVALID_ARGUMENT", "non_finite", ("lr=nan",)),
    "lr infinite": (Pushed(lr=(float("inf"),)), "INVALID_ARGUMENT", "non_finite", ("lr=inf",)),
    "lr below 0": (Pushed(lr=(-1.0,)), "INVALID_ARGUMENT", "invalid", ("lr=-1.0", "at least 0")),
    "two lrs": (Pushed(lr=(0.1, 0.1)), "INVALID_ARGUMENT", "invalid", ("2 learning rates",)),
    "many lrs": (
        Pushed(lr=(0.1,) * 400_000),
        "INVALID_ARGUMENT",
        "invalid",
        ("400000 learning rates",),
    ),
    "many NaN lrs": (
        Pushed(lr=(float("nan"),) * 400_000),
        "INVALID_ARGUMENT",
        "non_finite",
        ("lr=nan", "finite"),
    ),
    "coherence without its digest": (
        Pushed(coherence=[1.0, 1.0]),
        "INVALID_ARGUMENT",
        "damaged",
        ("another digest",),
    ),
    "other digest": (Pushed(digest=bytes(32)), "INVALID_ARGUMENT", "damaged", ("another digest",)),
    "short digest": (Pushed(digest=b"x"), "INVALID_ARGUMENT", "invalid", ("expected 32",)),
    "long digest": (Pushed(digest=b"x" * 3_000_000), "INVALID_ARGUMENT", "invalid", ("digest",)),
    "two headers": (two_headers, "INVALID_ARGUMENT", "damaged", ("two headers",)),
    "chunk first": (chunk_first, "INVALID_ARGUMENT", "damaged", ("without its header",)),
    "nothing": (nothing, "INVALID_ARGUMENT", "damaged", ("without its header",)),
    "empty message": (empty_message, "INVALID_ARGUMENT", "damaged", ("without its header",)),
    "a gap": (Pushed(sequence=1000), "OUT_OF_RANGE", "sequence_gap", ("'alice'", "expected push")),
    "the last number": (Pushed(sequence=2**64 - 1), "INVALID_ARGUMENT", "invalid", ("sequence=",)),
    "number 0": (Pushed(sequence=0), "INVALID_ARGUMENT", "invalid", ("sequence=0",)),
    "no chain": (
        Pushed(base=pb.Point(version=1, chain=b"x")),
        "INVALID_ARGUMENT",
        "invalid",
        ("1 bytes of chain", "expected 32"),
    ),
    "a base to come": (
        Pushed(base=pb.Point(version=2**63, chain=bytes(32))),
        "INVALID_ARGUMENT",
        "invalid",
        (f"based on version {2**63}", "expected at most"),
    ),
    "empty chunks": (empty_chunk, "INVALID_ARGUMENT", "invalid", ("an empty message",)),
    "a replay of nothing": (
        Pushed(applied_version=2**40, members=["alice"]),
        "INVALID_ARGUMENT",
        "invalid",
        ("applied in version", "lost nothing"),
    ),
    "a replay beside others": (
        Pushed(applied_version=5, members=["bob"]),
        "INVALID_ARGUMENT",
        "invalid",
        ("members=", "'alice'"),
    ),
    "a replay beside a crowd": (
        Pushed(applied_version=5, members=["bob"] * 400_000),
        "INVALID_ARGUMENT",
        "invalid",
        ("members",),
    ),
    "members that are no names": (
        Pushed(applied_version=5, members=["alice", "no/name"]),
        "INVALID_ARGUMENT",
        "invalid",
        ("worker='no/name'",),
    ),
}


@pytest.mark.parametrize("case", BAD_PUSHES)
def test_a_push_that_is_none(run: Run, case: str) -> None:
    check(run, *BAD_PUSHES[case])


@pytest.mark.parametrize(
    "case", [case for case in BAD_PUSHES if isinstance(BAD_PUSHES[case][0], Pushed)]
)
def test_a_push_in_one_message_that_is_none(run: Run, case: str) -> None:
    act, code, reason, words = BAD_PUSHES[case]
    assert isinstance(act, Pushed)
    check(run, act.in_one_message, code, reason, words)


def test_a_message_over_the_limit_is_not_even_read(run: Run) -> None:
    before = run.place.status()
    with pytest.raises(grpc.RpcError, match="larger than max") as caught:
        chunk_of(5 << 20)(run)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert run.place.status().state_sha256 == before.state_sha256
    run.step()


# who pushes, and where


def test_a_stale_epoch(run: Run) -> None:
    words = ("'alice' in epoch 1", "newer process", "epoch 2")
    check(run, lambda run: run.zombie.send(run.alice.next_push()), "ABORTED", "old_epoch", words)


@pytest.mark.parametrize("call", [name for name in CALLS if name not in ("join", "upload")])
def test_who_has_not_joined(run: Run, call: str) -> None:
    words = ("'bob'",)
    check(run, lambda run: CALLS[call](run.bob()), "FAILED_PRECONDITION", "not_joined", words)


@pytest.mark.parametrize("call", [name for name in CALLS if name != "join"])
def test_another_run(run: Run, call: str) -> None:
    def act(run: Run) -> None:
        lost = run.as_alice(TOKENS["alice"])
        lost.id = pb.WorkerId(run="f00d", worker="alice", epoch=run.alice.id.epoch)
        CALLS[call](lost)

    check(run, act, "FAILED_PRECONDITION", "wrong_run", ("'f00d'", run.alice.id.run))


def test_who_holds_what_another_run_made(run: Run) -> None:
    def act(run: Run) -> None:
        lost = run.bob()
        lost.id.run = "f00d"
        lost.join()

    words = ("'bob' belongs to run 'f00d'", "its own server")
    check(run, act, "FAILED_PRECONDITION", "wrong_run", words)


def test_an_epoch_to_come(run: Run) -> None:
    def act(run: Run) -> None:
        early = run.as_alice(TOKENS["alice"])
        early.id = pb.WorkerId(run=run.alice.id.run, worker="alice", epoch=2**63)
        early.send(early.next_push())

    check(run, act, "FAILED_PRECONDITION", "not_joined", ("join again",))


@pytest.mark.parametrize(
    "name", ["", "a/b", "a b", "..\n", "ü", "x" * 65, "x" * 3_000_000, "\U0001f600" * 500_000]
)
def test_names_that_are_none(run: Run, name: str) -> None:
    def act(run: Run) -> None:
        Worker(name, run.place.channel(TOKENS["bob"])).join()

    check(run, act, "INVALID_ARGUMENT", "invalid", ("worker=", "expected 1 to 64"))


def test_a_replay_is_answered_again_and_not_applied(run: Run) -> None:
    before = run.place.status()
    push = run.applied[-1]
    answers = [run.alice.send(push) for _ in range(3)]
    after = run.place.status()
    assert (after.point, after.state_sha256) == (before.point, before.state_sha256)
    assert after.refused == before.refused
    for answer in answers:
        assert answer.applied is not None
        assert answer.applied.version == before.point.version
        assert answer.members == ("alice",)
    run.step()


def test_an_applied_number_with_other_bytes(run: Run) -> None:
    def act(run: Run) -> None:
        last = run.applied[-1]
        run.alice.send(replace(run.alice.push_of(gradients(99)), sequence=last.sequence))

    words = ("'alice'", "other contents", "expected the same bytes")
    check(run, act, "ALREADY_EXISTS", "digest_differs", words)


def test_a_fetch_of_nothing(run: Run) -> None:
    def act(run: Run) -> None:
        list(run.alice.stub.Fetch(pb.FetchRequest(id=run.alice.id), timeout=CALL_S))

    check(run, act, "INVALID_ARGUMENT", "invalid", ("which=0", "expected WORKERS or CENTRAL"))


# whose model


def other_models() -> dict[str, tuple[dict[str, Tensor], str]]:
    same = model()
    bias = same["a.bias"]
    return {
        "shape": (
            same | {"a.weight": torch.zeros(3, 2)},
            "tensor 'a.weight' has shape (3, 2) here and (2, 3) in the run",
        ),
        "dtype": (
            same | {"a.bias": bias.double()},
            "tensor 'a.bias' has dtype torch.float64 here and torch.float32 in the run",
        ),
        "name": (
            {"a.weight": same["a.weight"], "b.bias": bias, "scale": same["scale"]},
            "tensor 'a.bias' of the run is missing here",
        ),
        "one more": (same | {"z": bias}, "tensor 'z' is here and not in the run"),
        "order": (dict(reversed(same.items())), "expected the same order"),
    }


@pytest.mark.parametrize("case", other_models())
def test_another_model(run: Run, case: str) -> None:
    named, words = other_models()[case]
    check(run, lambda run: run.bob(named).join(), "FAILED_PRECONDITION", "model_differs", (words,))


def joining(**changes: Any) -> Act:
    """Return what has bob join with these fields of the message."""

    def act(run: Run) -> None:
        fields: dict[str, Any] = {
            "worker": "bob",
            "instance": secrets.token_bytes(16),
            "model": codec.spec_to_wire(run.alice.spec),
        }
        run.bob().stub.Join(pb.JoinRequest(**fields | changes), timeout=CALL_S)

    return act


def tensor(name: str = "t", shape: tuple[int, ...] = (1,), dtype: str = "float32") -> pb.TensorSpec:
    return pb.TensorSpec(name=name, shape=shape, dtype=dtype)


BAD_JOINS: dict[str, tuple[Act, str, str, tuple[str, ...]]] = {
    "no tensors": (joining(model=[]), "INVALID_ARGUMENT", "invalid", ("no tensors",)),
    "no name": (joining(model=[tensor("")]), "INVALID_ARGUMENT", "invalid", ("not empty",)),
    "no dtype": (joining(model=[tensor(dtype="")]), "INVALID_ARGUMENT", "invalid", ("dtype ''",)),
    "a long dtype": (
        joining(model=[tensor(dtype="x" * 3_000_000)]),
        "INVALID_ARGUMENT",
        "invalid",
        ("tensor 't'", "expected one of"),
    ),
    "a long name": (
        joining(model=[tensor("x" * 3_000_000)]),
        "FAILED_PRECONDITION",
        "model_differs",
        ("tensor",),
    ),
    "twice": (
        joining(model=[tensor(), tensor()]),
        "INVALID_ARGUMENT",
        "invalid",
        ("'t' comes twice",),
    ),
    "a large shape": (
        joining(model=[tensor(shape=(2**63, 2**63))]),
        "INVALID_ARGUMENT",
        "invalid",
        ("'t'", "shape"),
    ),
    "a huge product": (
        joining(model=[tensor(shape=(2**47,) * 64)]),
        "INVALID_ARGUMENT",
        "invalid",
        ("'t'", "shape"),
    ),
    "many dimensions": (
        joining(model=[tensor(shape=(2**20,) * 1_000_000)]),
        "INVALID_ARGUMENT",
        "invalid",
        ("'t'", "expected at most 64 dimensions"),
    ),
    "zero among the large": (
        joining(model=[tensor(shape=(2**63, 0))]),
        "INVALID_ARGUMENT",
        "invalid",
        ("'t'",),
    ),
    "many tensors": (
        joining(model=[pb.TensorSpec()] * 1_000_000),
        "INVALID_ARGUMENT",
        "invalid",
        ("1000000 tensors", "at most 262144"),
    ),
    "many valid tensors": (
        joining(model=[tensor(str(number)) for number in range(150_000)]),
        "FAILED_PRECONDITION",
        "model_differs",
        ("'a.weight' of the run is missing",),
    ),
    "no instance": (joining(instance=b""), "INVALID_ARGUMENT", "invalid", ("expected 16 bytes",)),
    "a long instance": (
        joining(instance=b"x" * 3_000_000),
        "INVALID_ARGUMENT",
        "invalid",
        ("instance", "expected 16 bytes"),
    ),
    "an epoch past all": (joining(epoch=2**64 - 1), "INVALID_ARGUMENT", "invalid", ("epoch=",)),
    "a number past all": (
        joining(next_sequence=2**63),
        "INVALID_ARGUMENT",
        "invalid",
        ("next_sequence=",),
    ),
    "an oldest past all": (
        joining(first_kept=2**63),
        "INVALID_ARGUMENT",
        "invalid",
        ("next_sequence=",),
    ),
    "no chain": (
        joining(point=pb.Point(version=2**63), run="x"),
        "INVALID_ARGUMENT",
        "invalid",
        ("0 bytes of chain",),
    ),
    "a long run": (
        joining(run="x" * 3_000_000, point=pb.Point(chain=bytes(32))),
        "FAILED_PRECONDITION",
        "wrong_run",
        ("'bob' belongs to run 'x",),
    ),
}


@pytest.mark.parametrize("case", BAD_JOINS)
def test_a_join_that_is_none(run: Run, case: str) -> None:
    check(run, *BAD_JOINS[case])


# bytes that are no message


@pytest.mark.parametrize("method", ["Join", "Upload", "Step", "Fetch", "Renew", "Leave", "Status"])
def test_bytes_that_are_no_message(run: Run, method: str) -> None:
    def act(run: Run) -> None:
        call: Any = run.alice.channel.stream_stream(f"{SERVICE}/{method}")
        list(call(iter([b"\xff" * 100]), timeout=CALL_S))

    check(run, act, "INVALID_ARGUMENT", "damaged", (method,))


def test_an_upload_into_a_run_that_has_its_model_changes_nothing(run: Run) -> None:
    before = run.place.status()
    vectors = [bytes(raw.nbytes) for raw in run.alice.held.raw()]
    requests = codec.upload_requests(run.alice.id, [memoryview(vector) for vector in vectors])
    run.alice.stub.Upload(requests, timeout=CALL_S)
    after = run.place.status()
    assert (after.point, after.state_sha256) == (before.point, before.state_sha256)
    run.step()


def test_health_answers_whoever_got_through_the_handshake(run: Run) -> None:
    check_health: Any = run.place.channel(None).unary_unary("/grpc.health.v1.Health/Check")
    assert check_health(b"", timeout=CALL_S) == b"\x08\x01"


def test_damage_of_a_header_is_refused(run: Run) -> None:
    def act(run: Run) -> None:
        header = run.alice.header(run.alice.next_push())
        header.sequence += 1
        run.alice.stub.ShortStep(pb.ShortStepRequest(header=header), timeout=CALL_S)

    check(run, act, "INVALID_ARGUMENT", "damaged", ("header of push", "damaged on its way"))
