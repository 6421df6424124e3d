"""The gRPC side of the coordinator: messages in, calls to it, messages and statuses out."""

# ruff: noqa: N802 - gRPC names its methods

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict

import grpc

from topq_dist.profiling import labelled
from topq_dist.ps.protocol.errors import DamagedError, InvalidError, NotReadyError
from topq_dist.ps.protocol.types import CHUNK_BYTES, MAX_CHUNK_BYTES, Answer, check_worker_name
from topq_dist.ps.server.bounded_calls import FewCalls, SharedAnswers
from topq_dist.ps.server.coordinator import Coordinator
from topq_dist.ps.server.interceptor import Authenticates
from topq_dist.ps.server.push_queue import PendingPush
from topq_dist.ps.server.requests import JoinCall, PushPermit, WorkerId
from topq_dist.ps.server.run_counters import WorkerReport
from topq_dist.ps.wire.buffer_pool import BufferPool
from topq_dist.ps.wire.codec import (
    fetch_to_wire,
    groups_to_wire,
    join_parts,
    read_join_parts,
    spec_from_wire,
)
from topq_dist.ps.wire.messages import (
    Receiver,
    check_raw,
    point_from_wire,
    point_to_wire,
)
from topq_dist.ps.wire.steps import (
    answer_message,
    answer_to_wire,
    check_header,
    push_from_wire,
    receiver_of,
    short_answer_to_wire,
)
from topq_dist.v1 import parameter_server_pb2 as pb
from topq_dist.v1 import parameter_server_pb2_grpc as pb_grpc

_log = logging.getLogger(__name__)

_LOOK_S = 1.0
_SIGN_OF_LIFE_S = 5.0


class ParameterServerService(pb_grpc.ParameterServerServicer):
    """Serves one coordinator, behind an AuthInterceptor.

    It reports RefusedError, and reads and writes chunks as wire/messages.py has them.

    authenticator: None lets everybody speak in every worker's name.
    """

    def __init__(
        self, coordinator: Coordinator, *, authenticator: Authenticates | None = None
    ) -> None:
        self._coordinator = coordinator
        self._authenticator = authenticator
        self._steps = FewCalls()
        self._models = FewCalls()
        # the memory for a list that a stranger sends, and for what is made of it, is taken once
        self._long_join = threading.Lock()
        self._pool = BufferPool()
        # the workers of a round are sent the same
        self._shared = SharedAnswers() if coordinator.training.mode == "sync" else None
        self._look_s = min(_LOOK_S, coordinator.serving.lease_s / 4)

    def Join(self, request: pb.JoinRequest, context: grpc.ServicerContext) -> pb.JoinResponse:
        """Take a worker in."""
        self._authenticate(context, request.worker)
        call = JoinCall(
            run=request.run,
            worker=request.worker,
            instance=request.instance,
            epoch=request.epoch,
            next_sequence=request.next_sequence,
            held=point_from_wire(request.point) if request.HasField("point") else None,
            first_kept=request.first_kept,
            spec=spec_from_wire(request.model),
        )
        joined = self._coordinator.join(call)
        training = self._coordinator.training
        caller = joined.caller
        return pb.JoinResponse(
            id=pb.WorkerId(run=caller.run, worker=caller.worker, epoch=caller.epoch),
            next_sequence=joined.next_sequence,
            point=point_to_wire(joined.point),
            durable_version=joined.durable_version,
            upload=joined.upload,
            groups=groups_to_wire(joined.groups),
            mode=training.mode,
            downlink=training.downlink,
            lease_s=self._coordinator.serving.lease_s,
            takes_no_gradient=True,
            takes_report=self._coordinator.counters.observed,
            max_push_bytes=call.spec.max_frame_bytes,
        )

    def LongJoin(  # type: ignore[override] # the interceptor writes chunks
        self, request_iterator: Iterator[pb.JoinPart | memoryview], context: grpc.ServicerContext
    ) -> Iterator[pb.JoinPart | memoryview]:
        """Take a worker in whose model has very many tensors."""
        if not self._long_join.acquire(blocking=False):
            raise NotReadyError("another worker with a long list of tensors is joining: try again")
        try:
            request = read_join_parts(request_iterator, pb.JoinRequest)
            response = self.Join(request, context)
        finally:
            self._long_join.release()
        yield from join_parts(response)

    def Upload(
        self,
        request_iterator: Iterator[pb.UploadRequest | memoryview],
        context: grpc.ServicerContext,
    ) -> pb.UploadResponse:
        """Take the initial model in."""
        first = next(request_iterator, None)
        if not isinstance(first, pb.UploadRequest) or not first.HasField("id"):
            raise DamagedError("an upload begins without saying who sends it")
        caller = self._caller(context, first.id)
        spec = self._coordinator.upload_spec(caller)
        if spec is not None:
            receiver = Receiver(
                [vector.raw_bytes for vector in spec.vectors],
                limit_bytes=self._coordinator.serving.max_model_bytes,
                what=f"the model that {caller.worker!r} uploads",
            )
            with self._models.of(caller.worker, context):
                for request in request_iterator:
                    self._coordinator.hear(caller.worker)
                    receiver.take(_chunk(request, "an upload says twice who sends it"))
                vectors = receiver.parts()
                check_raw(vectors, first, f"the model that {caller.worker!r} uploads")
                self._coordinator.upload(caller, vectors)
        return pb.UploadResponse()

    def Step(  # type: ignore[override] # the interceptor writes chunks
        self, request_iterator: Iterator[pb.StepRequest | memoryview], context: grpc.ServicerContext
    ) -> Iterator[pb.StepResponse | memoryview | bytes]:
        """Take a push in, wait until it is decided, and answer."""
        first = next(request_iterator, None)
        if not isinstance(first, pb.StepRequest) or not first.HasField("header"):
            raise DamagedError("a step begins without its header")
        header = first.header
        check_header(header)
        caller = self._caller(context, header.id)
        permit = self._coordinator.permit(caller, header.sequence, header.digest)
        with self._steps.of(caller.worker, context):
            receiver = receiver_of(header, permit.spec, self._pool)
            for request in request_iterator:
                self._coordinator.hear(caller.worker)
                receiver.take(_chunk(request, "a step has two headers"))
            self._take_report(first)
            pending = self._submit(header, receiver, permit, context)
            while context.is_active():
                answer = self._decided(pending, context)
                if isinstance(answer, Answer):
                    self._note_sent(caller.worker, answer, context)
                    yield from self._messages_of(answer)
                    return
                yield pb.StepResponse(waiting=pb.Waiting(workers=answer))

    def ShortStep(  # type: ignore[override] # the interceptor writes bytes
        self, request: pb.ShortStepRequest, context: grpc.ServicerContext
    ) -> pb.ShortStepResponse | bytes:
        """Do the same with a push in one message, where the answer is there soon."""
        if not request.HasField("header"):
            raise DamagedError("a short step without its header")
        header = request.header
        check_header(header)
        caller = self._caller(context, header.id)
        permit = self._coordinator.permit(caller, header.sequence, header.digest)
        with self._steps.of(caller.worker, context):
            receiver = receiver_of(header, permit.spec, self._pool)
            if request.frames:
                receiver.take(request.frames)
            self._take_report(request)
            answer = self._decided(self._submit(header, receiver, permit, context), context)
            if isinstance(answer, Answer):
                if answer.payload_bytes > MAX_CHUNK_BYTES:
                    return pb.ShortStepResponse()  # Step brings it
                self._note_sent(caller.worker, answer, context)
                if self._shared is None:
                    return short_answer_to_wire(answer)
                return self._shared.short(answer)
            return pb.ShortStepResponse(waiting=pb.Waiting(workers=answer))

    def Fetch(  # type: ignore[override] # the interceptor writes chunks
        self, request: pb.FetchRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.FetchResponse | memoryview]:
        """Bring the whole model."""
        caller = self._caller(context, request.id)
        if request.which not in (
            pb.FetchRequest.WHICH_WORKERS,
            pb.FetchRequest.WHICH_CENTRAL,
        ):
            raise InvalidError(f"which={request.which}: expected WORKERS or CENTRAL")
        central = request.which == pb.FetchRequest.WHICH_CENTRAL
        with self._models.of(caller.worker, context):
            yield from fetch_to_wire(*self._coordinator.fetch(caller, central=central))

    def Renew(self, request: pb.RenewRequest, context: grpc.ServicerContext) -> pb.RenewResponse:
        """Keep the lease."""
        caller = self._caller(context, request.id)
        return pb.RenewResponse(durable_version=self._coordinator.renew(caller))

    def Leave(self, request: pb.LeaveRequest, context: grpc.ServicerContext) -> pb.LeaveResponse:
        """Give the worker's place up."""
        caller = self._caller(context, request.id)
        return pb.LeaveResponse(point=point_to_wire(self._coordinator.leave(caller)))

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusResponse:
        """Say how the run is doing."""
        self._authenticate(context, None)
        status = self._coordinator.status(
            state_sha256=request.state_sha256, is_active=context.is_active
        )
        training = self._coordinator.training
        return pb.StatusResponse(
            run=status.run,
            point=point_to_wire(status.point),
            durable_version=status.durable_version,
            mode=training.mode,
            downlink=training.downlink,
            inner_opt=training.inner_opt,
            momentum=training.momentum or "",
            momentum_text=self._coordinator.momentum_text,
            numel=status.numel,
            workers=[pb.WorkerStatus(**asdict(worker)) for worker in status.workers],
            refused=status.refused,
            received_bytes=status.received_bytes,
            sent_bytes=status.sent_bytes,
            uptime_s=status.uptime_s,
            state_sha256=status.state_sha256,
            round_workers=status.round_workers,
        )

    def _take_report(self, request: pb.StepRequest | pb.ShortStepRequest) -> None:
        if request.HasField("report"):
            said = {field.name: value for field, value in request.report.ListFields()}
            worker = request.header.id.worker
            self._coordinator.counters.take_report(worker, WorkerReport(**said))

    def _submit(
        self,
        header: pb.StepHeader,
        receiver: Receiver,
        permit: PushPermit,
        context: grpc.ServicerContext,
    ) -> PendingPush:
        frames, worker, totals = receiver.parts(), header.id.worker, self._coordinator.totals
        dense_bytes = permit.spec.raw_bytes if frames else 0
        totals.receive(worker, sum(frame.nbytes for frame in frames), dense_bytes)
        began_s = time.perf_counter()
        with labelled("decode a push"):
            push = push_from_wire(header, frames, permit.spec)
        totals.decoded(time.perf_counter() - began_s)
        pending = self._coordinator.submit(permit, push)
        context.add_callback(lambda: self._coordinator.wake(pending))
        return pending

    def _decided(
        self, pending: PendingPush, context: grpc.ServicerContext
    ) -> Answer | tuple[str, ...]:
        """Return the answer, or whom the push waits for after a time or once nobody listens."""
        silent_s = 0.0
        while True:
            answer = self._coordinator.wait(pending, self._look_s, is_active=context.is_active)
            silent_s += self._look_s
            gone = silent_s >= _SIGN_OF_LIFE_S or not context.is_active()
            if isinstance(answer, Answer) or gone:
                return answer

    def _note_sent(self, worker: str, answer: Answer, context: grpc.ServicerContext) -> None:
        # before it goes out: who has it already and asks for the status finds it counted
        if context.is_active():
            self._coordinator.note_sent(worker, answer)

    def _messages_of(self, answer: Answer) -> Iterator[pb.StepResponse | memoryview | bytes]:
        if self._shared is None or answer.payload_bytes <= CHUNK_BYTES:
            yield from answer_to_wire(answer)
            return
        yield pb.StepResponse(answer=answer_message(answer))
        yield from self._shared.messages_of(answer.updates)

    def _caller(self, context: grpc.ServicerContext, message: pb.WorkerId) -> WorkerId:
        self._authenticate(context, message.worker)
        return WorkerId(run=message.run, worker=message.worker, epoch=message.epoch)

    def _authenticate(self, context: grpc.ServicerContext, worker: str | None) -> None:
        if worker is not None:
            check_worker_name(worker)
        if self._authenticator is not None:
            self._authenticator.check(context.invocation_metadata(), worker)


def _chunk(message: pb.StepRequest | pb.UploadRequest | memoryview, otherwise: str) -> memoryview:
    if isinstance(message, memoryview):
        return message
    if message.WhichOneof("part") != "chunk":
        raise DamagedError(f"{otherwise}: expected chunks after the first message")
    return memoryview(message.chunk)
