"""Messages of a stream to and from bytes: a chunk without protobuf, which would copy it twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, TypeVar

import grpc
from google.protobuf.message import Message

from topq_dist.v1 import parameter_server_pb2 as pb
from topq_dist.v1 import parameter_server_pb2_grpc as pb_grpc

M = TypeVar("M", bound=Message)
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


STEP_REQUESTS: Final = ChunkedMessages(pb.StepRequest)
STEP_RESPONSES: Final = ChunkedMessages(pb.StepResponse)
UPLOAD_REQUESTS: Final = ChunkedMessages(pb.UploadRequest)
FETCH_RESPONSES: Final = ChunkedMessages(pb.FetchResponse)
_SERVICE: Final = "/" + pb.DESCRIPTOR.services_by_name["ParameterServer"].full_name
_STEP: Final = f"{_SERVICE}/Step"
_UPLOAD: Final = f"{_SERVICE}/Upload"
_FETCH: Final = f"{_SERVICE}/Fetch"

# of the methods whose messages can be chunks, for the server's side
READERS: Final[Mapping[str, Callable[[bytes], Any]]] = {
    _STEP: STEP_REQUESTS.from_bytes,
    _UPLOAD: UPLOAD_REQUESTS.from_bytes,
}
WRITERS: Final[Mapping[str, Callable[[Any], bytes]]] = {
    _STEP: STEP_RESPONSES.to_bytes,
    _FETCH: FETCH_RESPONSES.to_bytes,
}


class Calls:
    """The generated stub, for streams of messages and chunks."""

    def __init__(self, channel: grpc.Channel) -> None:
        stub = pb_grpc.ParameterServerStub(channel)
        self.Join = stub.Join
        self.ShortStep = stub.ShortStep
        self.Renew = stub.Renew
        self.Leave = stub.Leave
        self.Status = stub.Status
        self.Step: grpc.StreamStreamMultiCallable[Any, Any] = channel.stream_stream(
            _STEP,
            request_serializer=STEP_REQUESTS.to_bytes,
            response_deserializer=STEP_RESPONSES.from_bytes,
        )
        self.Upload: grpc.StreamUnaryMultiCallable[Any, pb.UploadResponse] = channel.stream_unary(
            _UPLOAD,
            request_serializer=UPLOAD_REQUESTS.to_bytes,
            response_deserializer=pb.UploadResponse.FromString,
        )
        self.Fetch: grpc.UnaryStreamMultiCallable[pb.FetchRequest, Any] = channel.unary_stream(
            _FETCH,
            request_serializer=pb.FetchRequest.SerializeToString,
            response_deserializer=FETCH_RESPONSES.from_bytes,
        )
