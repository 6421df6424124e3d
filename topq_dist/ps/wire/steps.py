"""A push and its answer as messages: streams of chunks, or one short message each way.

What comes in is checked here: what no peer of this library would send raises InvalidError.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from topq_dist.compress.codec.frame import FrameError, decode_frame
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.errors import DamagedError, InvalidError, NonFiniteError
from topq_dist.ps.protocol.types import (
    DIGEST_BYTES,
    MAX_CHUNK_BYTES,
    Answer,
    Push,
    PushRecord,
    Update,
    UpdateKind,
    check_worker_name,
    push_digest,
)
from topq_dist.ps.wire.buffer_pool import BufferPool
from topq_dist.ps.wire.messages import (
    Receiver,
    check_raw,
    chunk_of,
    chunks,
    point_from_wire,
    point_to_wire,
)
from topq_dist.v1 import parameter_server_pb2 as pb

_LARGEST = 2**64 - 1


def step_header(worker: pb.WorkerId, push: PushRecord) -> pb.StepHeader:
    """Return what a push says before its frames."""
    header = pb.StepHeader(
        id=worker,
        sequence=push.sequence,
        base=point_to_wire(push.base),
        frame_bytes=[frame.nbytes for frame in push.frames],
        lr=push.lr,
        digest=push.digest,
        applied_version=push.applied_version,
        members=push.members,
        momentum=push.momentum,
        coherence=push.coherence,
        weight_decay=push.weight_decay,
        no_gradient=push.no_gradient,
    )
    header.header_digest = header_digest(header)
    return header


def header_digest(header: pb.StepHeader) -> bytes:
    """Return the SHA-256 of what the digest of a push's contents leaves out of its header."""
    sender, base, frame_bytes = header.id, header.base, header.frame_bytes
    run, worker, chain, digest = (
        sender.run.encode(),
        sender.worker.encode(),
        base.chain,
        header.digest,
    )
    # in one go, since it is made of every push: each part that varies behind its length
    packed = struct.pack(
        f"<Q{len(run)}sQ{len(worker)}s3QQ{len(chain)}s{len(frame_bytes) + 1}QQ{len(digest)}s2Q",
        *(len(run), run, len(worker), worker),
        *(sender.epoch, header.sequence, base.version, len(chain), chain),
        *(len(frame_bytes), *frame_bytes, len(digest), digest),
        *(header.applied_version, len(header.members)),
    )
    return hashlib.sha256(packed + _behind_lengths(header.members)).digest()


def _behind_lengths(texts: Iterable[str]) -> bytes:
    """Return each text's UTF-8 behind its length."""
    return b"".join(len(raw).to_bytes(8, "little") + raw for raw in map(str.encode, texts))


# of the members of a version, who are as a rule those of the one before
_kept_behind_lengths = lru_cache(maxsize=4)(_behind_lengths)


def check_header(header: pb.StepHeader) -> None:
    """Raise DamagedError where a header is not the one that its worker has made."""
    if header.header_digest and header_digest(header) != header.header_digest:
        raise DamagedError(
            f"the header of push {header.sequence} of {header.id.worker!r} has another digest than "
            "it says: damaged on its way"
        )


def step_requests(
    worker: pb.WorkerId, push: PushRecord, report: pb.WorkerReport | None = None
) -> Iterator[pb.StepRequest | memoryview]:
    """Yield the header of a push and its chunks; report: of its worker, for who looks on."""
    yield pb.StepRequest(header=step_header(worker, push), report=report)
    yield from chunks(push.frames)


def receiver_of(header: pb.StepHeader, spec: ModelSpec, pool: BufferPool | None = None) -> Receiver:
    """Return what takes the chunks of a push on a model of `spec`, into memory of `pool`.

    Raises InvalidError or TooLargeError for a header that no push can have.
    """
    vectors = len(spec.vectors)
    if len(header.frame_bytes) not in (0, vectors):
        raise InvalidError(f"{len(header.frame_bytes)} frames: expected {vectors}, or none")
    if len(header.digest) != DIGEST_BYTES:
        raise InvalidError(f"{len(header.digest)} bytes of digest: expected {DIGEST_BYTES}")
    for worker in header.members:
        check_worker_name(worker)
    return Receiver(
        header.frame_bytes,
        limit_bytes=spec.max_frame_bytes,
        what=f"push {header.sequence} of {header.id.worker!r}",
        pool=pool,
    )


def push_from_wire(header: pb.StepHeader, frames: Sequence[memoryview], spec: ModelSpec) -> Push:
    """Return the push of `header`, its frames (as many as the header says) decoded and checked.

    The push may keep views of `frames`, which nobody is to write into then.

    Raises NonFiniteError for NaN and infinity, DamagedError for a digest of other bytes and
    InvalidError for bytes that are no frames of `spec`.
    """
    lr, momentum, coherence = tuple(header.lr), tuple(header.momentum), tuple(header.coherence)
    weight_decay, no_gradient = tuple(header.weight_decay), header.no_gradient
    what = f"push {header.sequence} of {header.id.worker!r}"
    digest = push_digest(lr, frames, momentum, coherence, weight_decay, no_gradient)
    if digest != header.digest:
        raise DamagedError(f"{what} has another digest than its header says: damaged on its way")
    for value in lr:
        if not np.isfinite(value):
            raise NonFiniteError(f"{what} has lr={value!r}: expected finite numbers")
        if value < 0:
            raise InvalidError(f"{what} has lr={value!r}: expected numbers of at least 0")
    decoded = []
    for number, (frame, vector) in enumerate(
        zip(frames, spec.vectors if frames else (), strict=True)
    ):
        try:
            decoded.append(decode_frame(frame, numel=vector.numel, in_place=True))
        except FrameError as error:
            raise InvalidError(f"frame {number} of {what}: {error}") from error
    if not all(frame.finite for frame in decoded):
        raise NonFiniteError(f"{what} holds NaN or infinity: skip the step, and send no gradient")
    return Push(
        worker=header.id.worker,
        epoch=header.id.epoch,
        sequence=header.sequence,
        base=point_from_wire(header.base),
        frames=tuple(decoded),
        lr=lr,
        digest=header.digest,
        applied_version=header.applied_version,
        members=tuple(header.members),
        momentum=momentum,
        coherence=coherence,
        weight_decay=weight_decay,
        no_gradient=no_gradient,
        frame_bytes=sum(header.frame_bytes),
    )


def answer_message(answer: Answer) -> pb.StepAnswer:
    """Return what an answer says before its payloads."""
    message = pb.StepAnswer(
        outcome=pb.StepAnswer.OUTCOME_STALE,
        members=answer.members,
        durable_version=answer.durable_version,
        disagreement=answer.disagreement,
        updates=[
            pb.Update(
                kind=pb.Update.Kind.ValueType(update.kind.value),
                point=point_to_wire(update.point),
                payload_bytes=[payload.nbytes for payload in update.payloads],
                checksum=update.checksum,
            )
            for update in answer.updates
        ],
    )
    if answer.applied is not None:
        message.outcome = pb.StepAnswer.OUTCOME_APPLIED
        message.applied_version = answer.applied.version
        message.applied_point.CopyFrom(point_to_wire(answer.applied))
    message.checksum = answer_checksum(message)
    return message


def answer_checksum(message: pb.StepAnswer) -> int:
    """Return the CRC-32 of what an answer says before its payloads, which bring their own."""
    outcome = message.outcome & _LARGEST  # a damaged one may be negative
    parts = [struct.pack("<QQQ", outcome, message.applied_version, len(message.members))]
    parts += [_kept_behind_lengths(tuple(message.members)), _packed_point(message.applied_point)]
    parts += [struct.pack("<QQ", message.durable_version, len(message.updates))]
    for update in message.updates:
        sizes = update.payload_bytes
        parts += [struct.pack("<Q", update.kind & _LARGEST), _packed_point(update.point)]
        parts += [struct.pack(f"<{2 + len(sizes)}Q", update.checksum, len(sizes), *sizes)]
    return zlib.crc32(b"".join(parts))


def _packed_point(point: pb.Point) -> bytes:
    chain = point.chain
    return struct.pack(f"<2Q{len(chain)}s", point.version, len(chain), chain)


def payloads_of(answer: Answer) -> list[memoryview]:
    """Return what follows an answer's message: the payloads of all its updates."""
    return [payload for update in answer.updates for payload in update.payloads]


def answer_to_wire(answer: Answer) -> Iterator[pb.StepResponse | memoryview]:
    """Yield the header of `answer` and its chunks."""
    yield pb.StepResponse(answer=answer_message(answer))
    yield from chunks(payloads_of(answer))


def read_answer(
    responses: Iterator[pb.StepResponse | memoryview],
    spec: ModelSpec,
    *,
    waiting: Callable[[tuple[str, ...]], None] = lambda _: None,
    pool: BufferPool | None = None,
) -> Answer:
    """Read the messages of an answer to its end, calling `waiting` with each sign of life.

    pool: where the memory for the payloads comes from.

    Raises InvalidError for what no server of this library would send.
    """
    message = None
    for response in responses:
        part = None if isinstance(response, memoryview) else response
        if part is None or not (part.HasField("waiting") or part.HasField("answer")):
            raise InvalidError("a step's answer begins with its payload: expected its header")
        if part.HasField("answer"):
            message = part.answer
            break
        waiting(tuple(part.waiting.workers))
    if message is None:
        raise InvalidError("the stream ended before the step's answer")
    receiver = receiver_of_answer(message, spec, pool)
    for response in responses:
        receiver.take(chunk_of(response))
    return answer_from_wire(message, receiver.parts(), spec)


def receiver_of_answer(
    message: pb.StepAnswer, spec: ModelSpec, pool: BufferPool | None = None
) -> Receiver:
    """Return what takes the payloads of an answer; raises InvalidError where it is none."""
    if message.HasField("checksum") and answer_checksum(message) != message.checksum:
        raise DamagedError("a step's answer has another checksum than it says: damaged on its way")
    known = (pb.StepAnswer.OUTCOME_APPLIED, pb.StepAnswer.OUTCOME_STALE)
    if message.outcome not in known:
        raise InvalidError(
            f"a step's answer has outcome {message.outcome}: expected one of {known}"
        )
    sizes = [size for update in message.updates for size in _payload_bytes(update, spec)]
    return Receiver(sizes, limit_bytes=sum(sizes), what="a step's answer", pool=pool)


def answer_from_wire(
    message: pb.StepAnswer, payloads: Iterable[memoryview], spec: ModelSpec
) -> Answer:
    """Return the answer of a message that has passed `receiver_of_answer`, and its payloads.

    Raises InvalidError for payloads that were damaged on their way.
    """
    left = iter(payloads)
    applied = message.outcome == pb.StepAnswer.OUTCOME_APPLIED
    return Answer(
        applied=point_from_wire(message.applied_point) if applied else None,
        members=tuple(message.members),
        updates=tuple(
            _update(update, tuple(next(left) for _ in spec.vectors)) for update in message.updates
        ),
        durable_version=message.durable_version,
        disagreement=message.disagreement,
    )


def _update(message: pb.Update, payloads: tuple[memoryview, ...]) -> Update:
    check_raw(payloads, message, "an update")
    point = point_from_wire(message.point)
    return Update(kind=UpdateKind(message.kind), point=point, payloads=payloads)


def short_step_request(
    worker: pb.WorkerId, push: PushRecord, report: pb.WorkerReport | None = None
) -> pb.ShortStepRequest:
    """Return a push as one message; report: of its worker, for who looks on."""
    header = step_header(worker, push)
    return pb.ShortStepRequest(header=header, frames=b"".join(push.frames), report=report)


def short_answer_to_wire(answer: Answer) -> pb.ShortStepResponse:
    """Return `answer` as one message, which is empty where that would be too long."""
    if answer.payload_bytes > MAX_CHUNK_BYTES:
        return pb.ShortStepResponse()
    payloads = b"".join(payloads_of(answer))
    return pb.ShortStepResponse(answer=answer_message(answer), payloads=payloads)


def read_short_answer(response: pb.ShortStepResponse, spec: ModelSpec) -> Answer | None:
    """Return the answer, or None where the server asks for Step.

    Raises InvalidError for what no server of this library would send.
    """
    if not response.HasField("answer"):
        return None
    receiver = receiver_of_answer(response.answer, spec)
    if response.payloads:
        receiver.take(response.payloads)
    return answer_from_wire(response.answer, receiver.parts(), spec)


def _payload_bytes(update: pb.Update, spec: ModelSpec) -> list[int]:
    if update.kind not in (kind.value for kind in UpdateKind):
        raise InvalidError(f"an update of kind {update.kind}: expected SET, ADD or FULL")
    sizes = list(update.payload_bytes)
    if len(sizes) != len(spec.vectors):
        raise InvalidError(f"an update of {len(sizes)} payloads: expected {len(spec.vectors)}")
    largest = max(spec.raw_bytes, spec.max_frame_bytes)
    if sum(sizes) > largest:
        raise InvalidError(f"an update of {sum(sizes)} bytes: expected at most {largest}")
    return sizes
