"""Protobuf messages <-> the protocol's objects; for both sides.

Everything that comes in is checked here: what is not what protocol.py means raises InvalidError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from topq_dist.compress.frame import FrameError, decode_frame
from topq_dist.ps.buffers import Buffers
from topq_dist.ps.chunks import Receiver, chunks
from topq_dist.ps.model import DTYPES, ModelSpec, TensorSpec
from topq_dist.ps.protocol import (
    CHAIN_BYTES,
    DIGEST_BYTES,
    Answer,
    GroupView,
    InvalidError,
    NonFiniteError,
    Point,
    Push,
    Update,
    UpdateKind,
    check_worker_name,
    push_digest,
)
from topq_dist.v1 import parameter_server_pb2 as pb

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def point_to_wire(point: Point) -> pb.Point:
    """Return `point` as a message."""
    return pb.Point(version=point.version, chain=point.chain)


def point_from_wire(message: pb.Point) -> Point:
    """Return the point in `message`; raises InvalidError where its chain is no chain."""
    if len(message.chain) != CHAIN_BYTES:
        raise InvalidError(
            f"a point with {len(message.chain)} bytes of chain: expected {CHAIN_BYTES}"
        )
    return Point(version=message.version, chain=message.chain)


def spec_to_wire(spec: ModelSpec) -> list[pb.TensorSpec]:
    """Return the tensors of `spec` as messages, in its order."""
    return [
        pb.TensorSpec(name=tensor.name, shape=tensor.shape, dtype=_DTYPE_NAMES[tensor.dtype])
        for tensor in spec.tensors
    ]


def spec_from_wire(messages: Iterable[pb.TensorSpec]) -> ModelSpec:
    """Return the model in `messages`; raises InvalidError for what can be none."""
    tensors = []
    for message in messages:
        if message.dtype not in DTYPES:
            raise InvalidError(
                f"tensor {message.name!r} has dtype {message.dtype!r}: expected one of "
                f"{', '.join(DTYPES)}"
            )
        tensors.append(
            TensorSpec(name=message.name, shape=tuple(message.shape), dtype=DTYPES[message.dtype])
        )
    return ModelSpec(tensors=tuple(tensors))


def groups_to_wire(groups: Iterable[GroupView]) -> list[pb.Group]:
    """Return parameter groups as messages."""
    return [
        pb.Group(
            names=group.names,
            numbers=group.numbers,
            betas=group.betas,
            takes_momentum=group.takes_momentum,
        )
        for group in groups
    ]


def groups_from_wire(messages: Iterable[pb.Group]) -> tuple[GroupView, ...]:
    """Return the parameter groups in `messages`."""
    return tuple(
        GroupView(
            names=tuple(message.names),
            numbers=dict(message.numbers),
            betas=tuple(message.betas),
            takes_momentum=message.takes_momentum,
        )
        for message in messages
    )


def step_header(
    worker: pb.WorkerId,
    *,
    sequence: int,
    base: Point,
    frames: Sequence[memoryview],
    lr: Sequence[float],
    digest: bytes,
    applied_version: int = 0,
    members: Sequence[str] = (),
    momentum: Sequence[float] = (),
) -> pb.StepHeader:
    """Return what a push says before its frames; the parameters are those of protocol.Push."""
    return pb.StepHeader(
        id=worker,
        sequence=sequence,
        base=point_to_wire(base),
        frame_bytes=[frame.nbytes for frame in frames],
        lr=lr,
        digest=digest,
        applied_version=applied_version,
        members=members,
        momentum=momentum,
    )


def step_requests(
    worker: pb.WorkerId, *, frames: Sequence[memoryview], **push: Any
) -> Iterator[pb.StepRequest | memoryview]:
    """Yield the header of a push and its chunks; the parameters are those of `step_header`."""
    yield pb.StepRequest(header=step_header(worker, frames=frames, **push))
    yield from chunks(frames)


def receiver_of(header: pb.StepHeader, spec: ModelSpec, buffers: Buffers | None = None) -> Receiver:
    """Return what takes the chunks of a push on a model of `spec`, into memory of `buffers`.

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
        buffers=buffers,
    )


def push_from_wire(header: pb.StepHeader, frames: Sequence[memoryview], spec: ModelSpec) -> Push:
    """Return the push of `header`, its frames (as many as the header says) decoded and checked.

    The push may keep views of `frames`, which nobody is to write into then.

    Raises NonFiniteError for NaN and infinity, InvalidError for a digest of other bytes or bytes
    that are no frames of `spec`.
    """
    lr, momentum = tuple(header.lr), tuple(header.momentum)
    what = f"push {header.sequence} of {header.id.worker!r}"
    if push_digest(lr, frames, momentum) != header.digest:
        raise InvalidError(f"{what} has another digest than its header says: damaged on its way")
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
    )


def answer_message(answer: Answer) -> pb.StepAnswer:
    """Return what an answer says before its payloads."""
    message = pb.StepAnswer(
        outcome=pb.StepAnswer.OUTCOME_STALE,
        members=answer.members,
        durable_version=answer.durable_version,
        updates=[
            pb.Update(
                kind=pb.Update.Kind.ValueType(update.kind.value),
                point=point_to_wire(update.point),
                payload_bytes=[payload.nbytes for payload in update.payloads],
            )
            for update in answer.updates
        ],
    )
    if answer.applied is not None:
        message.outcome = pb.StepAnswer.OUTCOME_APPLIED
        message.applied_version = answer.applied.version
        message.applied_point.CopyFrom(point_to_wire(answer.applied))
    return message


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
    buffers: Buffers | None = None,
) -> Answer:
    """Read the messages of an answer to its end, calling `waiting` with each sign of life.

    buffers: where the memory for the payloads comes from.

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
    receiver = receiver_of_answer(message, spec, buffers)
    for response in responses:
        receiver.take(_chunk(response))
    return answer_from_wire(message, receiver.parts(), spec)


def receiver_of_answer(
    message: pb.StepAnswer, spec: ModelSpec, buffers: Buffers | None = None
) -> Receiver:
    """Return what takes the payloads of an answer; raises InvalidError where it is none."""
    known = (pb.StepAnswer.OUTCOME_APPLIED, pb.StepAnswer.OUTCOME_STALE)
    if message.outcome not in known:
        raise InvalidError(
            f"a step's answer has outcome {message.outcome}: expected one of {known}"
        )
    sizes = [size for update in message.updates for size in _payload_bytes(update, spec)]
    return Receiver(sizes, limit_bytes=sum(sizes), what="a step's answer", buffers=buffers)


def answer_from_wire(
    message: pb.StepAnswer, payloads: Iterable[memoryview], spec: ModelSpec
) -> Answer:
    """Return the answer of a message that has passed `receiver_of_answer`, and its payloads."""
    left = iter(payloads)
    applied = message.outcome == pb.StepAnswer.OUTCOME_APPLIED
    return Answer(
        applied=point_from_wire(message.applied_point) if applied else None,
        members=tuple(message.members),
        updates=tuple(
            Update(
                kind=UpdateKind(update.kind),
                point=point_from_wire(update.point),
                payloads=tuple(next(left) for _ in spec.vectors),
            )
            for update in message.updates
        ),
        durable_version=message.durable_version,
    )


def fetch_to_wire(
    point: Point, durable_version: int, vectors: Sequence[memoryview]
) -> Iterator[pb.FetchResponse | memoryview]:
    """Yield the header and the chunks that bring a whole model, as raw vectors."""
    header = pb.FetchHeader(
        point=point_to_wire(point),
        durable_version=durable_version,
        vector_bytes=[vector.nbytes for vector in vectors],
    )
    yield pb.FetchResponse(header=header)
    yield from chunks(vectors)


def read_fetch(
    responses: Iterator[pb.FetchResponse | memoryview], spec: ModelSpec
) -> tuple[Point, int, tuple[memoryview, ...]]:
    """Read a whole model: its point, the durable version, and the raw vectors.

    Raises InvalidError where it is not a model of `spec`.
    """
    first = next(responses, None)
    if not isinstance(first, pb.FetchResponse) or not first.HasField("header"):
        raise InvalidError("a fetched model begins without its header")
    expected = [vector.raw_bytes for vector in spec.vectors]
    if list(first.header.vector_bytes) != expected:
        raise InvalidError(
            f"a fetched model has vectors of {list(first.header.vector_bytes)} bytes: "
            f"expected {expected}"
        )
    receiver = Receiver(expected, limit_bytes=sum(expected), what="a fetched model")
    for response in responses:
        receiver.take(_chunk(response))
    return point_from_wire(first.header.point), first.header.durable_version, receiver.parts()


def upload_requests(
    worker: pb.WorkerId, vectors: Sequence[memoryview]
) -> Iterator[pb.UploadRequest | memoryview]:
    """Yield the header and the chunks that bring a worker's raw vectors to the server."""
    yield pb.UploadRequest(id=worker)
    yield from chunks(vectors)


def _chunk(message: pb.StepResponse | pb.FetchResponse | memoryview) -> memoryview | bytes:
    # a message of another kind, in the place of a chunk, has an empty one
    return message if isinstance(message, memoryview) else message.chunk


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
