"""A word to the user where a worker waits: for whom, or that the server is away."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 1.0
# a server says for whom a push waits after 5 s at the latest, so that silence is longer
_WAITS_S = 4.0
_FAILING_S = 3.0
# a call that fails is tried again sooner: what failed longer ago does not any more
_RETRIED_S = 2.0
_SILENT_S = 10.0
# where waiting is as usual, there is nothing to tell
_UNUSUAL = 3.0
_MEMORY = 0.9


class WaitNotice(threading.Thread):
    """Logs once a wait where it gets long, and that it is over; one for each server.

    clock: seconds. Its methods may be called from any thread, the waits from one at a time.
    """

    def __init__(
        self, address: str, worker: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(name=f"notices of {address}", daemon=True)
        self._server = f"parameter server {address}"
        self._worker = worker
        self._clock = clock
        self._closing = threading.Event()
        self._usual_s = 0.0
        self._what = ""
        self._began_s: float | None = None
        self._heard_s = 0.0
        self._workers: tuple[str, ...] | None = None
        # since when calls fail, and when the last one did
        self._failed_s: float | None = None
        self._last_failed_s = 0.0
        self._error: Exception | None = None
        self._told: set[str] = set()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Count the block as a wait of `what`, such as "push 7"."""
        self._what, self._workers, self._error, self._failed_s = what, None, None, None
        self._told = set()
        began_s = self._heard_s = self._clock()
        self._began_s = began_s
        try:
            yield
        finally:
            self._began_s = None
            waited_s = self._clock() - began_s
            if self._told:
                _log.info("worker %s: %s is over after %.0f s", self._worker, what, waited_s)
            self._usual_s = _MEMORY * self._usual_s + (1.0 - _MEMORY) * waited_s

    def heard(self, workers: tuple[str, ...] | None = None) -> None:
        """Note a sign of life of the server; workers: for whom it waits, where it says so."""
        self._heard_s = self._clock()
        self._workers, self._error, self._failed_s = workers, None, None
        self._look()

    def failed(self, error: Exception) -> None:
        """Note that a call has failed and is tried again."""
        self._workers, self._error = None, error
        self._last_failed_s = self._clock()
        self._failed_s = self._failed_s or self._last_failed_s

    def run(self) -> None:
        """Look every second."""
        while not self._closing.wait(_LOOK_EVERY_S):
            self._look()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        if self.ident is not None:
            self.join()

    def _look(self) -> None:
        began_s, workers, failed_s, now_s = (
            self._began_s,
            self._workers,
            self._failed_s,
            self._clock(),
        )
        if began_s is None:
            return
        waited_s = now_s - began_s
        if failed_s is not None and now_s - self._last_failed_s <= _RETRIED_S:
            if now_s - failed_s >= _FAILING_S:
                self._tell("server", f"{self._server} does not take it: {self._error}", waited_s)
        elif waited_s < _UNUSUAL * self._usual_s:
            return
        elif workers is not None and waited_s >= _WAITS_S:
            whom = ", ".join(workers) or "others to join"
            self._tell("workers", f"waits for {whom} at {self._server}", waited_s)
        elif workers is None and now_s - self._heard_s >= _SILENT_S:
            self._tell("server", f"{self._server} does not answer", waited_s)

    def _tell(self, kind: str, text: str, waited_s: float) -> None:
        if kind not in self._told:
            self._told.add(kind)
            _log.warning(
                "worker %s: %s, %.0f s so far: %s", self._worker, self._what, waited_s, text
            )
