"""The way of each call to a service: whose it is, and how long it may take.

gRPC lends a call one of its few threads before anything is known of it, and waits there without a
limit: here a stranger's is sent away before it has said a word, and nobody's may stay silent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import grpc

from topq_dist.ps.protocol.errors import (
    REASON_KEY,
    BusyError,
    DamagedError,
    RefusedError,
)
from topq_dist.ps.wire.messages import READERS, WRITERS

_log = logging.getLogger(__name__)

GRACE_S = 30.0
LEAST_RATE_BYTES_S = 128 << 10  # bytes a second; about 1 Mbit/s
# a step, a renewal and what repeats them on a new connection, beside the operator's questions
CALLS_OF_A_HOLDER = 8
# of those whom nobody has to know, for asking after the server's health
CALLS_OF_STRANGERS = 4
GRACE_OF_STRANGERS_S = 5.0
# gRPC's class takes parameters in its stubs alone
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_OPEN_TO_ALL = "/grpc.health.v1.Health/"
# gRPC's clients take no more than 8 KiB of status, in which a character may count 12
_MESSAGE_START, _MESSAGE_END = 400, 200
_LOOK_S = 0.5


@dataclass(eq=False, kw_only=True)
class _Watch:
    context: grpc.ServicerContext
    end_s: float
    late: bool = False


@dataclass(kw_only=True)
class Crowd:
    """Calls that have said nothing yet: beyond `most` of them the oldest is ended."""

    most: int
    watches: deque[_Watch] = field(default_factory=deque)


class CallWatchdog:
    """Cancels calls from a thread of its own: gRPC waits for messages without a limit.

    on_late: called after each. clock: seconds; asked every half second at least.
    """

    def __init__(self, on_late: Callable[[], None], clock: Callable[[], float]) -> None:
        self._on_late = on_late
        self.clock = clock
        self._lock = threading.Lock()
        self._watches: set[_Watch] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._walk, name="call watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancel nothing more."""
        self._closed.set()
        self._thread.join()

    def begin(
        self, context: grpc.ServicerContext, end_s: float, crowd: Crowd | None = None
    ) -> _Watch:
        """Cancel the call at `end_s` unless `end` comes first; `late` says whether that was done.

        crowd: may end it sooner, as too late as well.
        """
        watch = _Watch(context=context, end_s=end_s)
        surplus = None
        with self._lock:
            self._watches.add(watch)
            if crowd is not None:
                crowd.watches.append(watch)
                if len(crowd.watches) > crowd.most:
                    surplus = crowd.watches.popleft()
                    self._watches.discard(surplus)
        if surplus is not None:
            self._cancel(surplus)
        return watch

    def end(self, watch: _Watch, crowd: Crowd | None = None) -> None:
        """Leave the call alone from here on."""
        with self._lock:
            self._watches.discard(watch)
            if crowd is not None and watch in crowd.watches:
                crowd.watches.remove(watch)

    def _walk(self) -> None:
        while not self._closed.wait(_LOOK_S):
            now_s = self.clock()
            with self._lock:
                late = [watch for watch in self._watches if watch.end_s <= now_s]
                self._watches.difference_update(late)
            for watch in late:
                self._cancel(watch)

    def _cancel(self, watch: _Watch) -> None:
        watch.late = True
        watch.context.cancel()
        self._on_late()


class ThroughputLimit:
    """A limit on the time that all messages of one direction of a call together are waited for.

    grace_s: to begin with. least_rate_bytes_s: bytes that buy another second.
    """

    def __init__(
        self,
        watchdog: CallWatchdog,
        context: grpc.ServicerContext,
        *,
        grace_s: float,
        least_rate_bytes_s: float,
    ) -> None:
        self._watchdog = watchdog
        self._context = context
        self._left_s = grace_s
        self._least_rate = least_rate_bytes_s
        self.late = False

    @contextmanager
    def waiting(self, crowd: Crowd | None = None) -> Iterator[None]:
        """Count the time that the block takes, as one of a crowd."""
        started_s = self._watchdog.clock()
        watch = self._watchdog.begin(self._context, started_s + self._left_s, crowd)
        try:
            yield
        finally:
            self._watchdog.end(watch, crowd)
        self.late = watch.late
        self._left_s -= self._watchdog.clock() - started_s

    def moved(self, count_bytes: int) -> None:
        """Note that so many bytes have gone through."""
        self._left_s += count_bytes / self._least_rate


class Authenticates(Protocol):
    """Says whether a call may speak in a worker's name."""

    def check(self, metadata: Iterable[tuple[str, str | bytes]], worker: str | None) -> str:
        """Return whose token it is; raises RefusedError unless it may. None: anybody's will do."""


class AuthInterceptor(grpc.ServerInterceptor):
    """Stands before all services. authenticator: None lets everybody in.

    count_refused: called with the reason of each refusal, whether it is made here or behind.
    calls: how many a server has threads for. clock: seconds, by which calls are slow.
    """

    def __init__(
        self,
        *,
        authenticator: Authenticates | None,
        count_refused: Callable[[str], None],
        calls: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._authenticator = authenticator
        self._count_refused = count_refused
        self._watchdog = CallWatchdog(self._note_late, clock)
        self._lock = threading.Lock()
        self._handlers: dict[str, _Handler] = {}
        self._calls_of: Counter[str] = Counter()
        self._strangers = Crowd(most=CALLS_OF_STRANGERS)
        # where nobody has to show a token, the half of all threads is left to those who speak
        self._unknown = Crowd(most=max(1, calls // 2))

    def close(self) -> None:
        """End the thread that looks after calls."""
        self._watchdog.close()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], _Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Return a handler that lets what is behind it see a call only once it may pass."""
        method = handler_call_details.method
        handler = self._handlers.get(method)
        if handler is None:
            behind = continuation(handler_call_details)
            if behind is None:
                return None
            # of methods that there are, so that no stranger makes it grow
            handler = self._handlers[method] = self._handler(method, behind)
        return handler

    def _handler(self, method: str, behind: _Handler) -> _Handler:
        # all as streams: the one message of the others would be waited for out of our reach
        answer = _Answerer(self, behind, method)
        if behind.response_streaming:
            return grpc.stream_stream_rpc_method_handler(answer.many)
        return grpc.stream_unary_rpc_method_handler(answer.one, response_serializer=answer.write)

    def _note_late(self) -> None:
        # the client sees CANCELLED: there is no other way to end a call from outside
        self._count_refused("too_slow")
        _log.info("ended a call that moved less than %d bytes a second", LEAST_RATE_BYTES_S)

    def limit(self, context: grpc.ServicerContext, method: str) -> ThroughputLimit:
        """Return the limit of one direction of a call."""
        grace_s = GRACE_S
        if method.startswith(_OPEN_TO_ALL):
            grace_s = min(GRACE_S, GRACE_OF_STRANGERS_S)
        return ThroughputLimit(
            self._watchdog, context, grace_s=grace_s, least_rate_bytes_s=LEAST_RATE_BYTES_S
        )

    def crowd(self, method: str) -> Crowd | None:
        """Return what a call belongs to until it has said something; None: its sender is known."""
        if method.startswith(_OPEN_TO_ALL):
            return self._strangers
        return self._unknown if self._authenticator is None else None

    @contextmanager
    def admitted(self, context: grpc.ServicerContext, method: str) -> Iterator[None]:
        """Let a call in, and turn what is refused, here or in the block, into its status."""
        try:
            with self._counted(context, method):
                yield
        except RefusedError as error:
            self._count_refused(error.reason)
            _log.debug("%s refused: %s", method, error)
            context.set_trailing_metadata(((REASON_KEY, error.reason),))
            context.abort(grpc.StatusCode[error.status], _short(str(error)))

    @contextmanager
    def _counted(self, context: grpc.ServicerContext, method: str) -> Iterator[None]:
        if self._authenticator is None or method.startswith(_OPEN_TO_ALL):
            yield
            return
        holder = self._authenticator.check(context.invocation_metadata(), None)
        with self._lock:
            if self._calls_of[holder] >= CALLS_OF_A_HOLDER:
                raise BusyError(
                    f"{holder!r} has {CALLS_OF_A_HOLDER} calls under way: expected no more at a "
                    "time, try again when one has ended"
                )
            self._calls_of[holder] += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls_of[holder] -= 1
                if not self._calls_of[holder]:
                    del self._calls_of[holder]


class _Answerer:
    """Serves calls of one method: with one response, or with many."""

    def __init__(self, interceptor: AuthInterceptor, behind: _Handler, method: str) -> None:
        self._interceptor = interceptor
        self._behind: Any = behind  # which of its behaviors is there, its flags say
        self._method = method
        self._read: Any = READERS.get(method) or behind.request_deserializer
        self.write: Any = WRITERS.get(method) or behind.response_serializer

    def one(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        """Return the response."""
        with self._interceptor.admitted(context, self._method):
            behavior = self._behind.stream_unary or self._behind.unary_unary
            return behavior(self._argument(requests, context), context)

    def many(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Yield the responses, as they go over the wire."""
        with self._interceptor.admitted(context, self._method):
            behavior = self._behind.stream_stream or self._behind.unary_stream
            limit = self._interceptor.limit(context, self._method)
            for response in behavior(self._argument(requests, context), context):
                raw = self.write(response)
                limit.moved(len(raw))
                with limit.waiting():
                    yield raw

    def _argument(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        messages = self._messages(requests, context)
        if self._behind.request_streaming:
            return messages
        message = next(messages, None)
        if message is None:
            raise DamagedError(f"{self._method} without a request: expected one")
        return message

    def _messages(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
        limit = self._interceptor.limit(context, self._method)
        crowd = self._interceptor.crowd(self._method)
        while True:
            with limit.waiting(crowd):
                raw = next(requests, None)
            crowd = None
            if limit.late:  # a call that is cancelled may look like one that has said all
                context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "too slow")
            if raw is None:
                return
            limit.moved(len(raw))
            try:
                message = self._read(raw)
            except Exception as error:
                raise DamagedError(
                    f"{len(raw)} bytes sent to {self._method} are no message of its: {error}"
                ) from error
            yield message


def _short(text: str) -> str:
    if len(text) <= _MESSAGE_START + _MESSAGE_END:
        return text
    return f"{text[:_MESSAGE_START]} ... {text[-_MESSAGE_END:]}"
