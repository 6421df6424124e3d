"""Writes snapshots behind the training's back, one at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)
_RETRY_S = 1.0


class Saver(threading.Thread):
    """Calls `save` once or more after each `request`, never twice at once, until it works.

    save: takes a snapshot of what is there now and makes it durable.
    """

    def __init__(self, save: Callable[[], None]) -> None:
        super().__init__(name="snapshots", daemon=True)
        self._save = save
        self._wanted = threading.Event()
        self._closing = threading.Event()

    def request(self) -> None:
        """Ask for a snapshot of what is there now, or later."""
        self._wanted.set()

    def run(self) -> None:
        """Save whenever asked to."""
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._closing.is_set():
                return
            try:
                self._save()
            except Exception:  # noqa: BLE001 - logged, and tried again
                # a full disk may be emptied: until then nothing becomes durable, which workers see
                _log.exception("a snapshot could not be written; it is tried again")
                self._wanted.set()
                self._closing.wait(_RETRY_S)

    def close(self) -> None:
        """End the thread, once the snapshot that it writes now is done."""
        self._closing.set()
        self._wanted.set()
        if self.ident is not None:
            self.join()
