"""Messages and chunks: what goes in comes out, and nothing else is taken."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import create_autospec

import grpc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topq_dist.compress.codec.frame import encode_frame, encode_non_finite_frame
from topq_dist.compress.codec.values import quantize
from topq_dist.ps.client.call_errors import refusal_of
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol import errors
from topq_dist.ps.protocol.errors import (
    REASON_KEY,
    InvalidError,
    NonFiniteError,
    RefusedError,
    TooLargeError,
)
from topq_dist.ps.protocol.types import (
    MAX_CHUNK_BYTES,
    START,
    Answer,
    ModelVersion,
    PushRecord,
    Update,
    UpdateKind,
    push_digest,
)
from topq_dist.ps.wire import codec, steps
from topq_dist.ps.wire.messages import Receiver, chunks
from topq_dist.v1 import parameter_server_pb2 as pb

SPEC = ModelSpec.of(
    [("a", torch.zeros(2, 3)), ("b", torch.zeros(5, dtype=torch.bfloat16)), ("c", torch.zeros(()))]
)
WORKER = pb.WorkerId(run="r", worker="w", epoch=1)
SOMEWHERE = ModelVersion(version=7, chain=b"c" * 32)


def frames() -> list[memoryview]:
    made = []
    for vector in SPEC.vectors:
        values = torch.arange(1.0, 1.0 + vector.numel)
        made.append(encode_frame(vector.numel, torch.arange(vector.numel), quantize(values)))
    return [frame.numpy().data for frame in made]


def header_of(parts: list[memoryview], **changes: object) -> pb.StepHeader:
    push = PushRecord(
        sequence=1,
        base=START,
        frames=tuple(parts),
        lr=(0.5,),
        digest=push_digest((0.5,), parts),
    )
    return steps.step_header(WORKER, replace(push, **changes))  # type: ignore[arg-type]


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 50))
def test_chunks_are_the_buffers_one_behind_the_other(parts: list[bytes], chunk_bytes: int) -> None:
    pieces = list(chunks(map(memoryview, parts), chunk_bytes))
    assert b"".join(pieces) == b"".join(parts)
    assert all(len(chunk) == chunk_bytes for chunk in pieces[:-1])
    assert all(0 < len(chunk) <= chunk_bytes for chunk in pieces)
    receiver = Receiver([len(part) for part in parts], limit_bytes=1000, what="it")
    for chunk in pieces:
        assert not receiver.complete
        receiver.take(chunk)
    assert [bytes(part) for part in receiver.parts()] == parts


def test_a_receiver_takes_what_was_declared_and_no_more() -> None:
    with pytest.raises(TooLargeError, match="expected at most 9"):
        Receiver([4, 6], limit_bytes=9, what="it")
    with pytest.raises(TooLargeError):
        Receiver([2**64 - 1, 2**64 - 1], limit_bytes=10, what="it")
    receiver = Receiver([4], limit_bytes=9, what="it")
    receiver.take(b"abc")
    with pytest.raises(InvalidError, match="ended after 3 of 4"):
        receiver.parts()
    with pytest.raises(InvalidError, match="goes on after"):
        receiver.take(b"de")
    large = Receiver([MAX_CHUNK_BYTES + 1], limit_bytes=1 << 30, what="it")
    with pytest.raises(InvalidError, match="a chunk of"):
        large.take(bytes(MAX_CHUNK_BYTES + 1))


def test_a_push_goes_through() -> None:
    parts = frames()
    header = header_of(
        parts, applied=replace(SOMEWHERE, version=8), members=("v", "w"), base=SOMEWHERE
    )
    push = steps.push_from_wire(header, parts, SPEC)
    assert (push.worker, push.epoch, push.sequence, push.lr) == ("w", 1, 1, (0.5,))
    assert (push.base, push.applied_version, push.members) == (SOMEWHERE, 8, ("v", "w"))
    assert [frame.values.tolist() for frame in push.frames] == [
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        [1.0, 2.0, 3.0, 4.0, 5.0],
    ]


def test_a_push_without_a_gradient_has_no_frames() -> None:
    header = header_of([])
    assert steps.receiver_of(header, SPEC).parts() == ()
    assert steps.push_from_wire(header, [], SPEC).frames == ()


def test_a_push_that_is_none_is_refused() -> None:
    parts = frames()
    nan = [encode_non_finite_frame(7).numpy().data, parts[1]]
    with pytest.raises(NonFiniteError):
        steps.push_from_wire(header_of(nan), nan, SPEC)
    for lr in (float("nan"), float("inf")):
        header = header_of(parts, lr=(lr,), digest=push_digest((lr,), parts))
        with pytest.raises(NonFiniteError, match="lr="):
            steps.push_from_wire(header, parts, SPEC)
    with pytest.raises(InvalidError, match="another digest"):
        steps.push_from_wire(header_of(parts), parts[::-1], SPEC)
    with pytest.raises(InvalidError, match=r"frame 0 .* expected 7"):
        steps.push_from_wire(header_of(parts[::-1]), parts[::-1], SPEC)
    header = header_of(parts)
    header.base.chain = b"short"
    with pytest.raises(InvalidError, match="5 bytes of chain"):
        steps.push_from_wire(header, parts, SPEC)
    for wrong, words in (
        (header_of(parts[:1]), "1 frames: expected 2, or none"),
        (header_of(parts, digest=b"x"), "1 bytes of digest"),
        (header_of(parts, members=("no/name",)), "worker='no/name'"),
    ):
        with pytest.raises(InvalidError, match=words):
            steps.receiver_of(wrong, SPEC)
    huge = header_of(parts)
    huge.frame_bytes[0] = 1 << 50
    with pytest.raises(TooLargeError):
        steps.receiver_of(huge, SPEC)


def answers() -> list[Answer]:
    def update(kind: UpdateKind, version: int, *parts: bytes) -> Update:
        point = ModelVersion(version=version, chain=bytes([version]) * 32)
        return Update(kind=kind, point=point, payloads=tuple(map(memoryview, parts)))

    one = update(UpdateKind.SET, 1, b"abc", b"")
    two = update(UpdateKind.ADD, 2, b"d", b"efg")
    full = update(UpdateKind.FULL, 3, b"x" * 28, b"y" * 10)
    return [
        Answer(applied=two.point, members=("v", "w"), updates=(one, two), durable_version=1),
        Answer(applied=None, members=(), updates=(full,), durable_version=0),
        Answer(applied=None, members=(), updates=(), durable_version=9),
    ]


@pytest.mark.parametrize("answer", answers())
def test_an_answer_goes_through(answer: Answer) -> None:
    signs: list[tuple[str, ...]] = []

    def messages() -> Iterator[pb.StepResponse | memoryview]:
        yield pb.StepResponse(waiting=pb.Waiting(workers=["v"]))
        yield from steps.answer_to_wire(answer)

    assert steps.read_answer(messages(), SPEC, waiting=signs.append) == answer
    assert signs == [("v",)]


def test_an_answer_that_is_none_is_refused() -> None:
    good = list(steps.answer_to_wire(answers()[0]))
    for messages, words in (
        ([], "ended before"),
        (good[1:], "begins with its payload"),
        (good[:1], "ended after 0 of"),
        ([*good, good[-1]], "goes on after"),
    ):
        with pytest.raises(InvalidError, match=words):
            steps.read_answer(iter(messages), SPEC)
    for change, words in (
        ({"outcome": 0}, "outcome 0"),
        ({"updates": [pb.Update(kind=pb.Update.KIND_UNSPECIFIED)]}, "kind 0"),
        ({"updates": [pb.Update(kind=pb.Update.KIND_SET, payload_bytes=[1])]}, "1 payloads"),
        ({"updates": [pb.Update(kind=pb.Update.KIND_SET, payload_bytes=[1 << 60, 0])]}, "at most"),
    ):
        options: dict[str, object] = {"outcome": pb.StepAnswer.OUTCOME_STALE, **change}
        message = pb.StepResponse(answer=pb.StepAnswer(**options))  # type: ignore[arg-type]
        with pytest.raises(InvalidError, match=words):
            steps.read_answer(iter([message]), SPEC)


def test_a_model_goes_through() -> None:
    vectors = (memoryview(bytes(range(28))), memoryview(bytes(range(10))))
    full = Update.made(UpdateKind.FULL, SOMEWHERE, vectors)
    point, durable_version, read = codec.read_fetch(codec.fetch_to_wire(full, 5), SPEC)
    assert (point, durable_version) == (SOMEWHERE, 5)
    assert [bytes(part) for part in read] == [bytes(vector) for vector in vectors]
    with pytest.raises(InvalidError, match=r"expected \[28, 10\]"):
        codec.read_fetch(codec.fetch_to_wire(replace(full, payloads=vectors[::-1]), 5), SPEC)
    with pytest.raises(InvalidError, match="without its header"):
        codec.read_fetch(iter([]), SPEC)
    assert codec.spec_from_wire(codec.spec_to_wire(SPEC)) == SPEC
    for wrong in (
        pb.TensorSpec(name="a", shape=[1], dtype="int8"),
        pb.TensorSpec(name="", shape=[1], dtype="float32"),
        pb.TensorSpec(name="a", shape=[2**63, 2**63], dtype="float32"),
    ):
        with pytest.raises(InvalidError):
            codec.spec_from_wire([wrong])


def kinds() -> list[type[RefusedError]]:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return [k for k in found if issubclass(k, RefusedError) and k is not RefusedError]


def sent(*metadata: tuple[str, str]) -> grpc.RpcError:
    """An error as a client sees it."""
    error: grpc.RpcError = create_autospec(grpc.Call, instance=True)
    error.trailing_metadata.return_value = metadata  # type: ignore[attr-defined]
    error.details.return_value = "why"  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize("kind", kinds())
def test_each_refusal_has_a_status_and_comes_back_as_itself(kind: type[RefusedError]) -> None:
    assert grpc.StatusCode[kind.status] != grpc.StatusCode.UNKNOWN
    again = refusal_of(sent((REASON_KEY, kind.reason)))
    assert type(again) is kind
    assert str(again) == "why"


def test_an_error_that_is_no_refusal_stays_one() -> None:
    assert refusal_of(sent()) is None
    assert refusal_of(sent((REASON_KEY, "from another release"))) is None
    assert refusal_of(grpc.RpcError()) is None


class TestDamage:
    """Bytes that TCP's checksum let through are noticed wherever no frame has its own."""

    VECTORS = (memoryview(bytes(range(28))), memoryview(bytes(range(10))))
    FULL = Update.made(UpdateKind.FULL, SOMEWHERE, VECTORS)

    @staticmethod
    def damaged(chunk: memoryview) -> memoryview:
        return memoryview(bytes([*chunk[:-1], chunk[-1] ^ 1]))

    def test_of_a_fetched_model(self) -> None:
        header, *parts = codec.fetch_to_wire(self.FULL, 5)
        assert isinstance(header, pb.FetchResponse)
        assert isinstance(parts[-1], memoryview)
        wrong = [*parts[:-1], self.damaged(parts[-1])]
        with pytest.raises(InvalidError, match="a fetched model has another checksum"):
            codec.read_fetch(iter([header, *wrong]), SPEC)
        header.header.ClearField("checksum")  # as older servers have it
        codec.read_fetch(iter([header, *wrong]), SPEC)

    @pytest.mark.parametrize("short", [False, True])
    def test_of_a_full_update(self, short: bool) -> None:
        answer = Answer(applied=None, members=(), updates=(self.FULL,), durable_version=0)
        message = steps.short_answer_to_wire(answer)
        payloads = bytes(self.damaged(memoryview(message.payloads)))

        def read() -> None:
            if short:
                response = pb.ShortStepResponse(answer=message.answer, payloads=payloads)
                steps.read_short_answer(response, SPEC)
            else:
                first = pb.StepResponse(answer=message.answer)
                steps.read_answer(iter([first, memoryview(payloads)]), SPEC)

        with pytest.raises(InvalidError, match="an update has another checksum"):
            read()
        message.answer.updates[0].ClearField("checksum")
        message.answer.ClearField("checksum")  # as older servers have it
        read()

    def test_of_any_field_of_a_pushs_header(self) -> None:
        header = header_of(frames(), applied=SOMEWHERE, members=("v", "w"), base=SOMEWHERE)
        steps.check_header(header)
        changes: dict[str, object] = {
            "id": pb.WorkerId(run="r", worker="w", epoch=2),
            "sequence": 2,
            "base": pb.Point(version=8, chain=SOMEWHERE.chain),
            "frame_bytes": [1, 2],
            "digest": bytes(32),
            "applied_version": 9,
            "members": ["v", "x"],
        }
        # these are in the digest of the contents
        inside = {"lr", "momentum", "coherence", "weight_decay", "no_gradient", "header_digest"}
        assert changes.keys() | inside == set(pb.StepHeader.DESCRIPTOR.fields_by_name)
        for name, value in changes.items():
            other = pb.StepHeader.FromString(header.SerializeToString())
            other.ClearField(name)  # type: ignore[arg-type]
            other.MergeFrom(pb.StepHeader(**{name: value}))  # type: ignore[arg-type]
            with pytest.raises(InvalidError, match="damaged on its way"):
                steps.check_header(other)
            other.ClearField("header_digest")  # as older workers have it
            steps.check_header(other)


def _behind_length(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


_TEXTS = st.text(max_size=12)
_COUNTS = st.integers(0, 2**64 - 1)
_POINTS = st.builds(pb.Point, version=_COUNTS, chain=st.binary(max_size=40))


@given(
    worker=st.builds(pb.WorkerId, run=_TEXTS, worker=_TEXTS, epoch=_COUNTS),
    sequence=_COUNTS,
    base=_POINTS,
    frame_bytes=st.lists(_COUNTS, max_size=3),
    digest=st.binary(max_size=40),
    members=st.lists(_TEXTS, max_size=3),
)
def test_a_headers_digest_is_what_older_releases_make(
    worker: pb.WorkerId,
    sequence: int,
    base: pb.Point,
    frame_bytes: list[int],
    digest: bytes,
    members: list[str],
) -> None:
    parts = [
        *map(_behind_length, (worker.run.encode(), worker.worker.encode())),
        struct.pack("<3Q", worker.epoch, sequence, base.version),
        _behind_length(base.chain),
        struct.pack(f"<{len(frame_bytes) + 1}Q", len(frame_bytes), *frame_bytes),
        _behind_length(digest),
        struct.pack("<2Q", 5, len(members)),
        *(_behind_length(member.encode()) for member in members),
    ]
    header = pb.StepHeader(
        id=worker,
        sequence=sequence,
        base=base,
        frame_bytes=frame_bytes,
        digest=digest,
        applied_version=5,
        members=members,
    )
    assert steps.header_digest(header) == hashlib.sha256(b"".join(parts)).digest()


@given(point=_POINTS, members=st.lists(_TEXTS, max_size=3), sizes=st.lists(_COUNTS, max_size=3))
def test_an_answers_checksum_is_what_older_releases_make(
    point: pb.Point, members: list[str], sizes: list[int]
) -> None:
    update = pb.Update(
        kind=pb.Update.KIND_ADD, point=point, payload_bytes=sizes, checksum=2**32 - 1
    )
    message = pb.StepAnswer(
        outcome=pb.StepAnswer.OUTCOME_APPLIED,
        applied_version=7,
        applied_point=point,
        members=members,
        durable_version=6,
        updates=[update, update],
    )
    packed_point = struct.pack("<Q", point.version) + _behind_length(point.chain)
    packed_update = struct.pack("<Q", update.kind) + packed_point
    packed_update += struct.pack(f"<{2 + len(sizes)}Q", 2**32 - 1, len(sizes), *sizes)
    parts = [struct.pack("<QQQ", message.outcome, 7, len(members))]
    parts += [_behind_length(member.encode()) for member in members]
    parts += [packed_point, struct.pack("<QQ", 6, 2), packed_update, packed_update]
    assert steps.answer_checksum(message) == zlib.crc32(b"".join(parts))
