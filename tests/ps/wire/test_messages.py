"""Chunks without protobuf: the bytes are protobuf's, and what is no chunk is left to it."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from topq_dist.ps.wire.messages import (
    FETCH_RESPONSES,
    STEP_REQUESTS,
    STEP_RESPONSES,
    UPLOAD_REQUESTS,
    ChunkedMessages,
)
from topq_dist.v1 import parameter_server_pb2 as pb

KINDS = [
    (STEP_REQUESTS, pb.StepRequest),
    (STEP_RESPONSES, pb.StepResponse),
    (UPLOAD_REQUESTS, pb.UploadRequest),
    (FETCH_RESPONSES, pb.FetchResponse),
]
sizes = st.sampled_from([0, 1, 127, 128, 16_383, 16_384, 1 << 20, 2 << 20])


@pytest.mark.parametrize(("messages", "kind"), KINDS)
@given(size=sizes)
def test_a_chunk_is_written_and_read_as_protobuf_does(
    messages: ChunkedMessages[Any], kind: type, size: int
) -> None:
    chunk = bytes(range(256)) * (size // 256) + bytes(range(size % 256))
    raw = messages.to_bytes(memoryview(chunk))
    assert raw == kind(chunk=chunk).SerializeToString()
    read = messages.from_bytes(raw)
    assert isinstance(read, memoryview)
    assert bytes(read) == chunk
    assert messages.to_bytes(raw) is raw


@pytest.mark.parametrize(
    "message",
    [
        pb.StepRequest(),
        pb.StepRequest(header=pb.StepHeader(sequence=3)),
        pb.StepRequest(header=pb.StepHeader(digest=b"d" * 500)),
    ],
)
def test_other_messages_are_left_to_protobuf(message: pb.StepRequest) -> None:
    assert STEP_REQUESTS.from_bytes(STEP_REQUESTS.to_bytes(message)) == message


@given(st.binary(max_size=40) | st.binary(max_size=40).map(lambda rest: b"\x12" + rest))
def test_any_bytes_mean_what_they_mean_to_protobuf(raw: bytes) -> None:
    try:
        expected = pb.StepRequest.FromString(raw)
    except DecodeError:
        expected = None
    try:
        read = STEP_REQUESTS.from_bytes(raw)
    except DecodeError:
        read = None
    if isinstance(read, memoryview):
        assert expected is not None
        assert expected.WhichOneof("part") == "chunk"
        assert expected.chunk == read
    else:
        assert read == expected
