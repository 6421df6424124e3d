"""Messages of a stream to and from bytes, and long bytes to and from chunks of them.

A chunk goes without protobuf, which would copy it twice.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Final, Generic, TypeVar

import grpc
from google.protobuf.message import Message

from topq_dist.ps.protocol.errors import DamagedError, InvalidError, TooLargeError
from topq_dist.ps.protocol.types import (
    CHAIN_BYTES,
    CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    ModelVersion,
    raw_checksum,
)
from topq_dist.ps.wire.buffer_pool import BufferPool
from topq_dist.v1 import parameter_server_pb2 as pb
from topq_dist.v1 import parameter_server_pb2_grpc as pb_grpc


def chunks(buffers: Iterable[memoryview], chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Yield what is in `buffers`, one behind the other, in pieces of `chunk_bytes`.

    The last piece may be shorter. Pieces of one buffer are views of it.
    """
    started: list[memoryview] = []
    started_bytes = 0
    for buffer in buffers:
        view = buffer.cast("B")
        while view.nbytes:
            piece = view[: chunk_bytes - started_bytes]
            view = view[piece.nbytes :]
            started.append(piece)
            started_bytes += piece.nbytes
            if started_bytes == chunk_bytes:
                yield _joined(started)
                started, started_bytes = [], 0
    if started:
        yield _joined(started)


def _joined(pieces: Sequence[memoryview]) -> memoryview:
    return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))


class Receiver:
    """Takes chunks into one buffer of a size that was declared, and agreed to, before.

    sizes: bytes of each part. limit_bytes: of all parts together. what: names it in errors.
    pool: where the memory comes from.

    Raises TooLargeError for more than `limit_bytes`, before anything is allocated.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        limit_bytes: int,
        what: str,
        pool: BufferPool | None = None,
    ) -> None:
        self._what = what
        self._edges = [0, *accumulate(sizes)]
        total = self._edges[-1]
        if total > limit_bytes:
            raise TooLargeError(f"{what} of {total} bytes: expected at most {limit_bytes}")
        try:
            # memory that nothing has written to yet costs nothing, so a declaration alone does not
            self._buffer = (pool or BufferPool()).acquire(total).data
        except MemoryError as error:
            raise TooLargeError(f"{what} of {total} bytes: more than there is memory") from error
        self._received = 0

    @property
    def complete(self) -> bool:
        """Whether all that was declared is there."""
        return self._received == self._edges[-1]

    def take(self, chunk: bytes | memoryview) -> None:
        """Add the next chunk; raises InvalidError where it is empty, too long, or not due."""
        end = self._received + len(chunk)
        if not chunk:  # there could be any number of them
            raise InvalidError(f"an empty message in {self._what}: expected chunks of its bytes")
        if len(chunk) > MAX_CHUNK_BYTES:
            raise InvalidError(
                f"a chunk of {len(chunk)} bytes in {self._what}: expected at most {MAX_CHUNK_BYTES}"
            )
        if end > self._edges[-1]:
            raise InvalidError(
                f"{self._what} goes on after the {self._edges[-1]} bytes that it declared"
            )
        self._buffer[self._received : end] = chunk
        self._received = end

    def parts(self) -> tuple[memoryview, ...]:
        """Return the parts, writable views of one buffer; raises DamagedError for a short one."""
        if not self.complete:
            raise DamagedError(
                f"{self._what} ended after {self._received} of {self._edges[-1]} bytes"
            )
        return tuple(self._buffer[start:stop] for start, stop in pairwise(self._edges))


def check_raw(
    vectors: Iterable[memoryview],
    said: pb.UploadRequest | pb.FetchHeader | pb.Update,
    what: str,
) -> None:
    """Raise DamagedError where raw vectors are not those that `said` has the checksum of, if any.

    what: names them in the error.
    """
    if said.HasField("checksum") and raw_checksum(vectors) != said.checksum:
        raise DamagedError(f"{what} has another checksum than was said: damaged on its way")


M = TypeVar("M", bound=Message)
_CHECKSUM = struct.Struct("<BI")
_CHECKSUM_TAG = 15 << 3 | 5  # field 15, a fixed32


def with_checksum(message: Message) -> bytes:
    """Return the bytes of a message that has a field `checksum`, which ends them."""
    raw: bytes = message.SerializeToString()
    return raw + _CHECKSUM.pack(_CHECKSUM_TAG, zlib.crc32(raw))


def from_checked(message_type: type[M], raw: bytes) -> M:
    """Return the message; raises DecodeError, or DamagedError for another checksum than it says."""
    message = message_type.FromString(raw)
    if message.HasField("checksum"):
        end = len(raw) - _CHECKSUM.size
        if raw[end:] != _CHECKSUM.pack(_CHECKSUM_TAG, zlib.crc32(raw[:end])):
            raise DamagedError("another checksum than it says: damaged on its way")
    return message


_LENGTH_DELIMITED = 2
# of the length of a message; gRPC takes none of 4 GiB
_LONGEST_VARINT = 5


class ChunkedMessages(Generic[M]):
    """Messages of one type, in place of which a memoryview stands for one that is only a chunk.

    message_type: has a field `chunk`, bytes, numbered below 16.
    """

    def __init__(self, message_type: type[M]) -> None:
        self._type = message_type
        number = message_type.DESCRIPTOR.fields_by_name["chunk"].number
        self._tag = bytes([number << 3 | _LENGTH_DELIMITED])

    def to_bytes(self, message: M | memoryview | bytes) -> bytes:
        """Return what goes over the wire; bytes are that already."""
        if isinstance(message, bytes):
            return message
        if isinstance(message, memoryview):
            return b"".join((self._tag, _varint(message.nbytes), message))
        return message.SerializeToString()

    def from_bytes(self, raw: bytes) -> M | memoryview:
        """Return the message, a chunk as a view of `raw`; raises DecodeError for what is none."""
        if raw[:1] == self._tag:
            length, start = 0, 1
            for place, byte in enumerate(raw[1 : 1 + _LONGEST_VARINT]):
                length |= (byte & 0x7F) << 7 * place
                if byte < 0x80:
                    start = 2 + place
                    break
            if start + length == len(raw) and start > 1:
                return memoryview(raw)[start:]
        return self._type.FromString(raw)


def _varint(number: int) -> bytes:
    groups = bytearray()
    while number >= 0x80:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def _to_bytes(message: Message | bytes) -> bytes:
    """Return what goes over the wire; bytes are that already."""
    return message if isinstance(message, bytes) else message.SerializeToString()


STEP_REQUESTS: Final = ChunkedMessages(pb.StepRequest)
STEP_RESPONSES: Final = ChunkedMessages(pb.StepResponse)
UPLOAD_REQUESTS: Final = ChunkedMessages(pb.UploadRequest)
FETCH_RESPONSES: Final = ChunkedMessages(pb.FetchResponse)
JOIN_PARTS: Final = ChunkedMessages(pb.JoinPart)
_SERVICE: Final = "/" + pb.DESCRIPTOR.services_by_name["ParameterServer"].full_name
_JOIN: Final = f"{_SERVICE}/Join"
_RENEW: Final = f"{_SERVICE}/Renew"
_LEAVE: Final = f"{_SERVICE}/Leave"
_STEP: Final = f"{_SERVICE}/Step"
_SHORT_STEP: Final = f"{_SERVICE}/ShortStep"
_UPLOAD: Final = f"{_SERVICE}/Upload"
_FETCH: Final = f"{_SERVICE}/Fetch"
_LONG_JOIN: Final = f"{_SERVICE}/LongJoin"

# of the methods whose messages can be chunks, or have a checksum, for the server's side
READERS: Final[Mapping[str, Callable[[bytes], Any]]] = {
    _JOIN: partial(from_checked, pb.JoinRequest),
    _RENEW: partial(from_checked, pb.RenewRequest),
    _LEAVE: partial(from_checked, pb.LeaveRequest),
    _FETCH: partial(from_checked, pb.FetchRequest),
    _STEP: STEP_REQUESTS.from_bytes,
    _UPLOAD: UPLOAD_REQUESTS.from_bytes,
    _LONG_JOIN: JOIN_PARTS.from_bytes,
}
WRITERS: Final[Mapping[str, Callable[[Any], bytes]]] = {
    _JOIN: with_checksum,
    _RENEW: with_checksum,
    _LEAVE: with_checksum,
    _STEP: STEP_RESPONSES.to_bytes,
    _SHORT_STEP: _to_bytes,
    _FETCH: FETCH_RESPONSES.to_bytes,
    _LONG_JOIN: JOIN_PARTS.to_bytes,
}


class Calls:
    """The generated stub, for streams of messages and chunks, and for checksums."""

    def __init__(self, channel: grpc.Channel) -> None:
        stub = pb_grpc.ParameterServerStub(channel)
        self.Join: grpc.UnaryUnaryMultiCallable[pb.JoinRequest, pb.JoinResponse] = (
            channel.unary_unary(_JOIN, with_checksum, partial(from_checked, pb.JoinResponse))
        )
        self.Renew: grpc.UnaryUnaryMultiCallable[pb.RenewRequest, pb.RenewResponse] = (
            channel.unary_unary(_RENEW, with_checksum, partial(from_checked, pb.RenewResponse))
        )
        self.Leave: grpc.UnaryUnaryMultiCallable[pb.LeaveRequest, pb.LeaveResponse] = (
            channel.unary_unary(_LEAVE, with_checksum, partial(from_checked, pb.LeaveResponse))
        )
        self.ShortStep = stub.ShortStep
        self.Status = stub.Status
        self.Step: grpc.StreamStreamMultiCallable[Any, Any] = channel.stream_stream(
            _STEP,
            request_serializer=STEP_REQUESTS.to_bytes,
            response_deserializer=STEP_RESPONSES.from_bytes,
        )
        self.LongJoin: grpc.StreamStreamMultiCallable[Any, Any] = channel.stream_stream(
            _LONG_JOIN,
            request_serializer=JOIN_PARTS.to_bytes,
            response_deserializer=JOIN_PARTS.from_bytes,
        )
        self.Upload: grpc.StreamUnaryMultiCallable[Any, pb.UploadResponse] = channel.stream_unary(
            _UPLOAD,
            request_serializer=UPLOAD_REQUESTS.to_bytes,
            response_deserializer=pb.UploadResponse.FromString,
        )
        self.Fetch: grpc.UnaryStreamMultiCallable[pb.FetchRequest, Any] = channel.unary_stream(
            _FETCH,
            request_serializer=with_checksum,
            response_deserializer=FETCH_RESPONSES.from_bytes,
        )


def point_to_wire(point: ModelVersion) -> pb.Point:
    """Return `point` as a message."""
    return pb.Point(version=point.version, chain=point.chain)


def point_from_wire(message: pb.Point) -> ModelVersion:
    """Return the point in `message`; raises InvalidError where its chain is no chain."""
    if len(message.chain) != CHAIN_BYTES:
        raise InvalidError(
            f"a point with {len(message.chain)} bytes of chain: expected {CHAIN_BYTES}"
        )
    return ModelVersion(version=message.version, chain=message.chain)


def chunk_of(
    message: pb.StepResponse | pb.FetchResponse | pb.JoinPart | memoryview,
) -> memoryview | bytes:
    """Return the chunk in `message`; empty where it is a message of another kind."""
    # a message of another kind, in the place of a chunk, has an empty one
    return message if isinstance(message, memoryview) else message.chunk
