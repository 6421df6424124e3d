"""A step in one message each way: what it takes where frames and answer are short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from topq_dist.ps.model import ModelSpec
from topq_dist.ps.protocol import MAX_CHUNK_BYTES, Answer
from topq_dist.ps.wire import (
    answer_from_wire,
    answer_message,
    payloads_of,
    receiver_of_answer,
    step_header,
)
from topq_dist.v1 import parameter_server_pb2 as pb


def short_step_request(
    worker: pb.WorkerId, *, frames: Sequence[memoryview], **push: Any
) -> pb.ShortStepRequest:
    """Return a push as one message; the parameters are those of `step_header`."""
    header = step_header(worker, frames=frames, **push)
    return pb.ShortStepRequest(header=header, frames=b"".join(frames))


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
