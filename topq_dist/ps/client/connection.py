"""The calls to one server, over a channel that is made anew where that helps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from topq_dist.ps.client.call_errors import DoubtfulError, TransientError, meaning_of
from topq_dist.ps.client.probe import diagnose_connection, lasting_reason
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.errors import (
    DamagedError,
    InvalidError,
    ServerLostError,
    TooLargeError,
)
from topq_dist.ps.protocol.types import (
    SHORT_BYTES,
    SHORT_JOIN_BYTES,
    STREAM_WINDOW_BYTES,
    Answer,
    ModelVersion,
    PushRecord,
)
from topq_dist.ps.security.policy import ClientSecurity
from topq_dist.ps.wire.buffer_pool import BufferPool
from topq_dist.ps.wire.codec import join_parts, read_fetch, read_join_parts, upload_requests
from topq_dist.ps.wire.messages import Calls
from topq_dist.ps.wire.steps import (
    read_answer,
    read_short_answer,
    short_step_request,
    step_requests,
)
from topq_dist.v1 import parameter_server_pb2 as pb

_UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
# a server answers these within 5 s: later the end of a message was lost
_SHORT_CALL_S = 20.0


def channel_options() -> list[tuple[str, Any]]:
    """Return the gRPC options of a worker's channel."""
    return [
        # above 256 KiB gRPC's own retries stop without a word, and a push that is sent again may
        # need a Join before it
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        # the window of a stream: with gRPC's own, 64 KiB, a distant server sends little at a time
        ("grpc.http2.lookahead_bytes", STREAM_WINDOW_BYTES),
        # workers in one process would share a connection, and its flow control, otherwise
        ("grpc.use_local_subchannel_pool", 1),
    ]


class Connection:
    """A channel to the server at `address`.

    Every call has a time limit, and raises RefusedError, TransientError or DoubtfulError.

    waits_for: called with the names of those that a push waits for. report: what goes with the next
    pushes, for who looks on there.
    """

    def __init__(
        self,
        address: str,
        security: ClientSecurity,
        *,
        waits_for: Callable[[tuple[str, ...]], None] = lambda _: None,
    ) -> None:
        self.waits_for = waits_for
        self.report: pb.WorkerReport | None = None
        self.address = address
        self._security = security
        self._metadata = security.metadata()
        self._lock = threading.Lock()
        self._closed = False
        self._pool = BufferPool()
        # whether an answer is likely to fit into a message, and to be there soon
        self._short_answers = False
        self._channel: grpc.Channel | None = None
        self._open()

    def _open(self) -> None:
        self._channel = self._security.channel(self.address, channel_options())
        self._stub = Calls(self._channel)

    def join(self, request: pb.JoinRequest, timeout_s: float) -> pb.JoinResponse:
        """Take up or renew a worker's place; raises TooLargeError where the model has too many
        tensors for this server, or for any.
        """
        if request.ByteSize() <= SHORT_JOIN_BYTES:
            with self._errors():
                limit_s = min(timeout_s, _SHORT_CALL_S)
                return self._calls().Join(request, timeout=limit_s, metadata=self._metadata)
        parts = list(join_parts(request))
        with self._errors():
            call = self._calls().LongJoin(iter(parts), timeout=timeout_s, metadata=self._metadata)
            try:
                return read_join_parts(iter(call), pb.JoinResponse)
            except grpc.RpcError as error:
                if isinstance(error, grpc.Call) and error.code() is _UNIMPLEMENTED:
                    raise TooLargeError(
                        f"parameter server {self.address}: it is of a version that takes no model "
                        f"of {len(request.model)} tensors, whose names and shapes take "
                        f"{request.ByteSize()} bytes: start it with this version of topq_dist"
                    ) from None
                raise
            finally:
                call.cancel()

    def upload(self, worker: pb.WorkerId, vectors: Sequence[memoryview], timeout_s: float) -> None:
        """Bring the initial values."""
        requests = upload_requests(worker, vectors)
        with self._errors():
            self._calls().Upload(requests, timeout=timeout_s, metadata=self._metadata)

    def fetch(
        self,
        worker: pb.WorkerId,
        which: pb.FetchRequest.Which.ValueType,
        spec: ModelSpec,
        timeout_s: float,
    ) -> tuple[ModelVersion, int, tuple[memoryview, ...]]:
        """Return (point, durable version, raw vectors)."""
        request = pb.FetchRequest(id=worker, which=which)
        with self._errors():
            responses = self._calls().Fetch(request, timeout=timeout_s, metadata=self._metadata)
            return read_fetch(iter(responses), spec)

    def step(
        self,
        worker: pb.WorkerId,
        push: PushRecord,
        spec: ModelSpec,
        timeout_s: float,
        sign_of_life: Callable[[], None],
    ) -> Answer:
        """Push, or replay, a gradient; returns what the server has decided on it.

        sign_of_life: called now and then while the push waits for others.
        """

        def waiting(workers: tuple[str, ...]) -> None:
            sign_of_life()
            self.waits_for(workers)

        short = self._short_answers and push.frame_bytes <= SHORT_BYTES
        if short:
            request = short_step_request(worker, push, self.report)
            with self._errors():
                stub = self._calls()
                limit_s = min(timeout_s, _SHORT_CALL_S)
                response = stub.ShortStep(request, timeout=limit_s, metadata=self._metadata)
                answer = read_short_answer(response, spec)
            if answer is not None:
                return answer
            waiting(tuple(response.waiting.workers))
        answer, at_once = self._long_step(
            step_requests(worker, push, self.report), spec, timeout_s, waiting
        )
        # the next will be like this one
        self._short_answers = not short and at_once and answer.payload_bytes <= SHORT_BYTES
        return answer

    def _long_step(
        self,
        requests: Iterator[pb.StepRequest | memoryview],
        spec: ModelSpec,
        timeout_s: float,
        sign_of_life: Callable[[tuple[str, ...]], None],
    ) -> tuple[Answer, bool]:
        """Return the answer, and whether it came without a sign of life before."""
        waited = False

        def waiting(workers: tuple[str, ...]) -> None:
            nonlocal waited
            waited = True
            sign_of_life(workers)

        with self._errors():
            call = self._calls().Step(requests, timeout=timeout_s, metadata=self._metadata)
            try:
                answer = read_answer(iter(call), spec, waiting=waiting, pool=self._pool)
                return answer, not waited
            finally:
                # or an answer that is no good would leave the call open
                call.cancel()

    def renew(self, worker: pb.WorkerId, timeout_s: float) -> int:
        """Keep the lease; returns the durable version."""
        request = pb.RenewRequest(id=worker)
        with self._errors():
            response = self._calls().Renew(request, timeout=timeout_s, metadata=self._metadata)
        return response.durable_version

    def leave(self, worker: pb.WorkerId, timeout_s: float) -> int:
        """Give the place up; returns the server's version, which is durable."""
        request = pb.LeaveRequest(id=worker)
        with self._errors():
            response = self._calls().Leave(request, timeout=timeout_s, metadata=self._metadata)
        return response.point.version

    def refresh(self) -> None:
        """Make the channel anew, where TLS is used: certificates may have changed since."""
        if self._security.tls is not None:
            self.cancel_calls()

    def cancel_calls(self) -> None:
        """Have the calls under way fail with TransientError; the next makes the channel anew."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def close(self) -> None:
        """Break off what is under way, and take no more calls."""
        self._closed = True
        self.cancel_calls()

    def lost(self, timeout_s: float, last_error: Exception | None) -> ServerLostError:
        """Return the error that says that the server was silent for `timeout_s`."""
        where = self._security.check(self.address)
        why = (
            diagnose_connection(where, self._security.tls)
            or last_error
            or "it is there, but silent"
        )
        return ServerLostError(
            f"parameter server {self.address}: no answer within {timeout_s:g} s: {why}"
        )

    def lasting_reason(self) -> str | None:
        """Return why no further try will do; None where one may."""
        return lasting_reason(self._security.check(self.address), self._security.tls)

    def _calls(self) -> Calls:
        with self._lock:
            if self._channel is None:
                if self._closed:
                    raise TransientError("the connection was closed")
                try:
                    self._open()
                except ValueError as error:
                    # it worked before: the files may be changing right now
                    raise TransientError(str(error)) from error
            return self._stub

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except InvalidError as error:
            damaged = DamagedError(f"parameter server {self.address}: {error}")
            raise DoubtfulError(damaged) from error
        except grpc.RpcError as error:
            raise meaning_of(error, self.address) from None
