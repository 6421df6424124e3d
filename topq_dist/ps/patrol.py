"""Ends calls that keep the server waiting: for what they have to say, or to take in an answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

_LOOK_S = 0.5


@dataclass(eq=False, kw_only=True)
class _Watch:
    context: grpc.ServicerContext
    end_s: float
    late: bool = False


class Patrol:
    """Cancels calls from a thread of its own: gRPC waits for messages without a limit.

    on_late: called after each.
    """

    def __init__(self, on_late: Callable[[], None]) -> None:
        self._on_late = on_late
        self._lock = threading.Lock()
        self._watches: set[_Watch] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._walk, name="patrol", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancel nothing more."""
        self._closed.set()
        self._thread.join()

    def _walk(self) -> None:
        while not self._closed.wait(_LOOK_S):
            now_s = time.monotonic()
            with self._lock:
                late = [watch for watch in self._watches if watch.end_s <= now_s]
                self._watches.difference_update(late)
            for watch in late:
                watch.late = True
                watch.context.cancel()
                self._on_late()

    @contextmanager
    def watch(self, context: grpc.ServicerContext, limit_s: float) -> Iterator[_Watch]:
        """Cancel the call if the block lasts longer than `limit_s`; `late` says whether it did."""
        watch = _Watch(context=context, end_s=time.monotonic() + limit_s)
        with self._lock:
            self._watches.add(watch)
        try:
            yield watch
        finally:
            with self._lock:
                self._watches.discard(watch)


class Pace:
    """How long the messages of one direction of a call may be waited for, all of them together.

    patience_s: to begin with. least_rate: bytes that buy another second.
    """

    def __init__(
        self,
        patrol: Patrol,
        context: grpc.ServicerContext,
        *,
        patience_s: float,
        least_rate: float,
    ) -> None:
        self._patrol = patrol
        self._context = context
        self._left_s = patience_s
        self._least_rate = least_rate
        self.late = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time that the block takes."""
        started_s = time.monotonic()
        with self._patrol.watch(self._context, self._left_s) as watch:
            yield
        self.late = watch.late
        self._left_s -= time.monotonic() - started_s

    def moved(self, count_bytes: int) -> None:
        """Note that so many bytes have gone through."""
        self._left_s += count_bytes / self._least_rate
