"""Protobuf messages <-> the protocol's objects; for both sides.

Everything that comes in is checked here: what protocol/types.py has no meaning for raises
InvalidError.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from topq_dist.ps.model.spec import DTYPES, ModelSpec, TensorSpec
from topq_dist.ps.protocol.errors import DamagedError, InvalidError, TooLargeError
from topq_dist.ps.protocol.types import (
    MAX_JOIN_BYTES,
    GroupView,
    ModelVersion,
    Update,
    raw_checksum,
)
from topq_dist.ps.wire.messages import (
    Receiver,
    check_raw,
    chunk_of,
    chunks,
    from_checked,
    point_from_wire,
    point_to_wire,
    with_checksum,
)
from topq_dist.v1 import parameter_server_pb2 as pb

M = TypeVar("M", bound=Message)
# of a Join: each takes memory and time far beyond its bytes there
MOST_TENSORS = 1 << 18
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def spec_to_wire(spec: ModelSpec) -> list[pb.TensorSpec]:
    """Return the tensors of `spec` as messages, in its order."""
    return [
        pb.TensorSpec(name=tensor.name, shape=tensor.shape, dtype=_DTYPE_NAMES[tensor.dtype])
        for tensor in spec.tensors
    ]


def spec_from_wire(messages: Sequence[pb.TensorSpec]) -> ModelSpec:
    """Return the model in `messages`; raises InvalidError for what can be none."""
    if len(messages) > MOST_TENSORS:
        raise InvalidError(f"a model of {len(messages)} tensors: expected at most {MOST_TENSORS}")
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
            takes_coherence=group.takes_coherence,
            takes_weight_decay=group.takes_weight_decay,
            keeps_rate=group.keeps_rate,
            sums_momentum=group.sums_momentum,
            remembers_squares=group.remembers_squares,
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
            takes_coherence=message.takes_coherence,
            takes_weight_decay=message.takes_weight_decay,
            keeps_rate=message.keeps_rate,
            sums_momentum=message.sums_momentum,
            remembers_squares=message.remembers_squares,
        )
        for message in messages
    )


def fetch_to_wire(full: Update, durable_version: int) -> Iterator[pb.FetchResponse | memoryview]:
    """Yield the header and the chunks that bring a whole model, as raw vectors."""
    header = pb.FetchHeader(
        point=point_to_wire(full.point),
        durable_version=durable_version,
        vector_bytes=[vector.nbytes for vector in full.payloads],
        checksum=full.checksum,
    )
    yield pb.FetchResponse(header=header)
    yield from chunks(full.payloads)


def read_fetch(
    responses: Iterator[pb.FetchResponse | memoryview], spec: ModelSpec
) -> tuple[ModelVersion, int, tuple[memoryview, ...]]:
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
        receiver.take(chunk_of(response))
    vectors = receiver.parts()
    check_raw(vectors, first.header, "a fetched model")
    return point_from_wire(first.header.point), first.header.durable_version, vectors


def join_parts(message: Message) -> Iterator[pb.JoinPart | memoryview]:
    """Yield the parts that bring a long JoinRequest or JoinResponse.

    Raises TooLargeError for one that no part may announce.
    """
    raw = memoryview(with_checksum(message))
    if raw.nbytes > MAX_JOIN_BYTES:
        raise TooLargeError(
            f"the names and shapes of the model's tensors take {raw.nbytes} bytes: expected at "
            f"most {MAX_JOIN_BYTES}, so train fewer tensors or give them shorter names"
        )
    yield pb.JoinPart(total_bytes=raw.nbytes)
    yield from chunks([raw])


def read_join_parts(parts: Iterator[pb.JoinPart | memoryview], message_type: type[M]) -> M:
    """Read the message that `join_parts` yielded, and return it; raises RefusedError."""
    first = next(parts, None)
    if not isinstance(first, pb.JoinPart) or first.WhichOneof("part") != "total_bytes":
        raise InvalidError("a long Join begins without its length")
    receiver = Receiver([first.total_bytes], limit_bytes=MAX_JOIN_BYTES, what="a long Join")
    for part in parts:
        receiver.take(chunk_of(part))
    try:
        return from_checked(message_type, bytes(receiver.parts()[0]))
    except DecodeError as error:
        raise DamagedError(f"a long Join that is no message of its kind: {error}") from error


def upload_requests(
    worker: pb.WorkerId, vectors: Sequence[memoryview]
) -> Iterator[pb.UploadRequest | memoryview]:
    """Yield the header and the chunks that bring a worker's raw vectors to the server."""
    yield pb.UploadRequest(id=worker, checksum=raw_checksum(vectors))
    yield from chunks(vectors)
