"""Snapshots behind the training's back, and which version is durable."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from topq_dist.ps.protocol.errors import NotReadyError
from topq_dist.ps.state.directory_lock import LockLostError
from topq_dist.ps.state.snapshot import Snapshot, StateDir

_log = logging.getLogger(__name__)
_RETRY_S = 1.0
# versions that are made without a snapshot: workers keep their pushes for as long
_MOST_UNSAVED = 1000
_DURABLE_WITHIN_S = 60.0


class Snapshotter(threading.Thread):
    """Writes the snapshots of one run, one at a time, and lets others wait for them.

    changed: notified when a version has become durable; its lock guards the run. every: versions
    between two snapshots. snapshot: returns what is there now, None where there is nothing to save;
    called under the lock. check_alive: raises where nothing will be saved any more.
    """

    def __init__(
        self,
        state_dir: StateDir,
        changed: threading.Condition,
        *,
        every: int,
        snapshot: Callable[[], Snapshot | None],
        check_alive: Callable[[], None],
    ) -> None:
        super().__init__(name="snapshots", daemon=True)
        # -1: not even the initial model
        self.version = -1
        # whether another server has the directory, so that this one can save nothing any more
        self.lost = False
        self._failing = False
        self._requested_version = 0
        self._state_dir = state_dir
        self._changed = changed
        self._every = every
        self._snapshot = snapshot
        self._check_alive = check_alive
        self._wanted = threading.Event()
        self._closing = threading.Event()

    @property
    def acknowledged_version(self) -> int:
        """The durable version, as workers are told."""
        return max(self.version, 0)

    def go_on_from(self, version: int) -> None:
        """Note that the run goes on from a snapshot of `version`."""
        self.version = self._requested_version = version

    def made(self, version: int) -> None:
        """Note that `version` was made: where it is time, have it saved."""
        if version - self._requested_version >= self._every:
            self._requested_version = version
            self.request()

    def holds_up(self, version: int) -> bool:
        """Return whether none may be made after `version` until a snapshot is written.

        What is not durable is kept by all workers, and would grow without a limit.
        """
        intervals = 2 if self._failing else 10
        least = 0 if self._failing else _MOST_UNSAVED
        return version - self.acknowledged_version >= max(intervals * self._every, least)

    def request(self) -> None:
        """Have what is there now, or later, saved soon."""
        self._wanted.set()

    def run(self) -> None:
        """Save once or more after each request, until it works or another server has begun."""
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._closing.is_set():
                return
            try:
                self.save()
            except LockLostError as error:
                _log.critical("%s", error)
                self.lost = True
                with self._changed:
                    self._changed.notify_all()
                return
            except Exception as error:  # noqa: BLE001 - logged, and tried again
                # a full disk may be emptied: until then nothing becomes durable, which workers see
                if not self._failing:
                    _log.exception(
                        "a snapshot could not be written: it is tried again, and %d more versions"
                        " are made at most",
                        2 * self._every,
                    )
                _log.debug("a snapshot could not be written: %s", error)
                self._failing = True
                self._wanted.set()
                self._closing.wait(_RETRY_S)

    def save(self) -> None:
        """Save what is there."""
        with self._changed:
            snapshot = self._snapshot()
        if snapshot is None:
            return
        self._state_dir.save(snapshot)
        with self._changed:
            if self._failing:
                _log.warning("snapshots can be written again")
                self._failing = False
            self.version = max(self.version, snapshot.point.version)
            self._changed.notify_all()

    def wait(self, version: int) -> None:
        """Return once `version` is durable, or raise NotReadyError; under the lock."""
        end_s = time.monotonic() + _DURABLE_WITHIN_S
        if not self.reached(version, end_s):
            raise NotReadyError(f"version {version} could not be made durable: try again")

    def reached(
        self, version: int, end_s: float, is_active: Callable[[], bool] = lambda: True
    ) -> bool:
        """Wait for `version`, and return whether it is durable; under the lock.

        end_s: until when at most, on time.monotonic(). is_active: whether somebody still waits.
        """
        while self.version < version:
            self._check_alive()
            left_s = end_s - time.monotonic()
            if left_s <= 0 or not is_active():
                return False
            self._changed.wait(min(left_s, 1.0))
        return True

    def close(self) -> None:
        """End the thread, once the snapshot that it writes now is done."""
        self._closing.set()
        self._wanted.set()
        if self.ident is not None:
            self.join()
