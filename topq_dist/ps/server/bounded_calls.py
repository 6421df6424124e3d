"""Bounds on what the calls of workers make a server hold."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from topq_dist.ps.protocol.types import Answer, Update
from topq_dist.ps.wire.messages import STEP_RESPONSES, chunks
from topq_dist.ps.wire.steps import short_answer_to_wire

# one, and one that repeats it on a new connection before the old one is missed
_CALLS_OF_A_WORKER = 2


class SharedAnswers:
    """The answer and the updates that were last asked for, as they go over the wire."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answer: Answer | None = None
        self._short = b""
        self._updates: tuple[Update, ...] = ()
        self._messages: list[bytes] = []

    def short(self, answer: Answer) -> bytes:
        """Return the message of `short_answer_to_wire`."""
        with self._lock:
            if answer != self._answer:
                self._short = short_answer_to_wire(answer).SerializeToString()
                self._answer = answer
            return self._short

    def messages_of(self, updates: tuple[Update, ...]) -> list[bytes]:
        """Return the messages that bring the payloads of `updates`; not to be changed."""
        with self._lock:
            if list(map(id, updates)) != list(map(id, self._updates)):
                payloads = (payload for update in updates for payload in update.payloads)
                self._messages = [STEP_RESPONSES.to_bytes(chunk) for chunk in chunks(payloads)]
                self._updates = updates
            return self._messages


class FewCalls:
    """The large calls under way, by worker: what one worker can make the server hold is bounded.

    A worker has one, and a second where it repeats the first before the server has noticed that
    the connection was lost. Beyond that the oldest is cancelled; a push that it brought stays.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: defaultdict[str, deque[grpc.ServicerContext]] = defaultdict(deque)

    @contextmanager
    def of(self, worker: str, context: grpc.ServicerContext) -> Iterator[None]:
        """Count `context` as one of the worker's while the block runs."""
        with self._lock:
            under_way = self._of[worker]
            under_way.append(context)
            surplus = under_way.popleft() if len(under_way) > _CALLS_OF_A_WORKER else None
        if surplus is not None:
            surplus.cancel()
        try:
            yield
        finally:
            with self._lock:
                if context in under_way:
                    under_way.remove(context)
                if not under_way and self._of.get(worker) is under_way:
                    del self._of[worker]
