"""A worker of bare gRPC stubs, for tests of the server."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import torch
from torch import Tensor

from topq_dist.compress.codec.frame import encode_frame
from topq_dist.compress.codec.values import quantize
from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.model.update import apply_update
from topq_dist.ps.protocol.types import (
    FIRST_CHAIN,
    START,
    Answer,
    ModelVersion,
    PushRecord,
    push_digest,
)
from topq_dist.ps.wire import codec, messages, steps
from topq_dist.ps.wire.messages import Calls
from topq_dist.v1 import parameter_server_pb2 as pb

CALL_S = 30.0
# what a worker meets whose server has gone or come back
LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)


@dataclass(kw_only=True)
class Kept:
    """A push as it was sent, and what became of it."""

    sequence: int
    base: ModelVersion
    frames: list[memoryview]
    digest: bytes
    applied_version: int = 0
    members: tuple[str, ...] = ()

    def record(self, lr: Sequence[float] = ()) -> PushRecord:
        """Return what a worker of the library would send; another lr makes another digest."""
        known = ModelVersion(version=self.applied_version, chain=FIRST_CHAIN)
        return PushRecord(
            sequence=self.sequence,
            base=self.base,
            frames=tuple(self.frames),
            lr=tuple(lr),
            digest=push_digest(lr, self.frames) if lr else self.digest,
            applied=known if self.applied_version else None,
            members=self.members,
        )


@dataclass
class RawWorker:
    """Speaks for one worker through bare stubs; each method is one call, without a retry."""

    name: str
    model: dict[str, Tensor]
    address: str
    instance: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    def __post_init__(self) -> None:
        self.spec = ModelSpec.of(self.model.items())
        self.held = FlatModel(self.spec)
        self.held.copy_from(self.model.items())
        self.id = pb.WorkerId(worker=self.name)
        self.point: ModelVersion | None = None
        self.sequence = 0
        self.kept: list[Kept] = []
        self.channel = grpc.insecure_channel(
            self.address, options=[("grpc.max_reconnect_backoff_ms", 200)]
        )
        self.stub = Calls(self.channel)

    def join(self) -> pb.JoinResponse:
        """Join, upload where told to, and fetch where nothing is held yet."""
        joined = self.stub.Join(
            pb.JoinRequest(
                run=self.id.run,
                worker=self.name,
                instance=self.instance,
                epoch=self.id.epoch,
                next_sequence=self.sequence,
                point=None if self.point is None else messages.point_to_wire(self.point),
                first_kept=self.kept[0].sequence if self.kept else 0,
                model=codec.spec_to_wire(self.spec),
            ),
            timeout=CALL_S,
            wait_for_ready=True,
        )
        self.id = joined.id
        if joined.upload:
            requests = codec.upload_requests(self.id, self.held.raw())
            self.stub.Upload(requests, timeout=CALL_S)
        if self.point is None:
            self.fetch()
            self.sequence = joined.next_sequence
        return joined

    def fetch(self) -> None:
        """Take the whole model."""
        request = pb.FetchRequest(id=self.id, which=pb.FetchRequest.WHICH_WORKERS)
        responses = self.stub.Fetch(request, timeout=CALL_S)
        self.point, _, vectors = codec.read_fetch(responses, self.spec)
        self.held.load_raw(vectors)

    def push_of(self, gradients: Sequence[Tensor]) -> Kept:
        """Return the next push, of dense gradients, one for each vector, or of none."""
        frames = []
        for gradient in gradients:
            frame = encode_frame(
                gradient.numel(), torch.arange(gradient.numel()), quantize(gradient)
            )
            frames.append(frame.numpy().data)
        return Kept(
            sequence=self.sequence,
            base=self.point or START,
            frames=frames,
            digest=push_digest((), frames),
        )

    def send(self, push: Kept, timeout_s: float = CALL_S) -> Answer:
        """Send a push and return the answer, without taking it."""
        requests = steps.step_requests(self.id, push.record())
        return steps.read_answer(self.stub.Step(requests, timeout=timeout_s), self.spec)

    def take(self, push: Kept, answer: Answer) -> None:
        """Do what an answer to a new push says."""
        if answer.applied is not None:
            self.sequence = push.sequence + 1
            push.applied_version, push.members = answer.applied.version, answer.members
            self.kept.append(push)
        for update in answer.updates:
            apply_update(self.held, update)
            self.point = update.point
        durable = answer.durable_version
        self.kept = [kept for kept in self.kept if kept.applied_version > durable]

    def step(self, gradients: Sequence[Tensor]) -> Answer:
        """Push, and take the answer."""
        push = self.push_of(gradients)
        answer = self.send(push)
        self.take(push, answer)
        return answer

    def come_back(self) -> None:
        """Join again after the server came back, and replay what it has lost."""
        joined = self.join()
        for push in list(self.kept):
            if push.sequence >= joined.next_sequence:
                answer = self.send(push)
                if answer.applied is None:
                    raise AssertionError(f"replay {push.sequence} of {self.name} was stale")

    def join_through(self, end_s: float) -> None:
        """Join, whatever happens to the server until `end_s`."""
        while self.point is None:
            try:
                self.join()
            except grpc.RpcError as error:
                refused = isinstance(error, grpc.Call) and error.code() in LOST
                if not refused or time.monotonic() > end_s:
                    raise
                time.sleep(0.02)

    def step_through(self, gradients: Sequence[Tensor], end_s: float) -> Answer:
        """Push until it is answered, whatever happens to the server until `end_s`."""
        push = self.push_of(gradients)
        while True:
            try:
                answer = self.send(push, timeout_s=max(0.1, end_s - time.monotonic()))
                break
            except grpc.RpcError as error:
                self._mend(error, end_s)
        self.take(push, answer)
        return answer

    def _mend(self, error: grpc.RpcError, end_s: float) -> None:
        while True:
            if not isinstance(error, grpc.Call) or time.monotonic() > end_s:
                raise error
            if error.code() not in LOST:
                raise error
            try:
                time.sleep(0.02)
                if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                    self.come_back()
                return
            except grpc.RpcError as again:
                error = again
                time.sleep(0.02)

    def close(self) -> None:
        """Close the connection."""
        self.channel.close()
