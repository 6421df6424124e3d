"""Snapshots behind the training's back, and which version is durable."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from topq_dist.ps.protocol.errors import NotReadyError
from topq_dist.ps.state.directory_lock import LockLostError
from topq_dist.ps.state.snapshot import Snapshot
from topq_dist.ps.state.state_dir import StateDir
from topq_dist.telemetry.readings import Histogram

_log = logging.getLogger(__name__)
_RETRY_S = 1.0
# versions that are made without a snapshot: workers keep their pushes for as long
_MOST_UNSAVED = 1000
_DURABLE_WITHIN_S = 60.0
_BOUNDS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


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
        # for metrics: times of time.monotonic()
        self.durations = Histogram(_BOUNDS_S)
        self._made_s: deque[tuple[int, float]] = deque()
        self._due_s: float | None = None
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
        now_s = time.monotonic()
        # to the second: of a run without snapshots there are many
        if not self._made_s or now_s - self._made_s[-1][1] >= 1.0:
            self._made_s.append((version, now_s))
        if version - self._requested_version >= self._every:
            self._requested_version = version
            if self._due_s is None:
                self._due_s = now_s
            self.request()

    def unsaved_s(self) -> float:
        """Return since when there is a version that is in no snapshot; 0: none; under the lock."""
        return time.monotonic() - self._made_s[0][1] if self._made_s else 0.0

    def overdue_s(self) -> float:
        """Return since when a snapshot is due that is not written; 0: none is; under the lock."""
        return 0.0 if self._due_s is None else time.monotonic() - self._due_s

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
        began_s = time.monotonic()
        with self._changed:
            snapshot = self._snapshot()
        if snapshot is None:
            return
        self._state_dir.save(snapshot)
        version, took_s = snapshot.point.version, time.monotonic() - began_s
        with self._changed:
            self.durations.observe(took_s)
            while self._made_s and self._made_s[0][0] <= version:
                self._made_s.popleft()
            # another may have become due meanwhile
            self._due_s = None if version >= self._requested_version else time.monotonic()
            if self._failing:
                _log.warning("snapshots can be written again")
                self._failing = False
            self.version = max(self.version, snapshot.point.version)
            self._changed.notify_all()
        _log.info(
            "snapshot of version %d written: %.1f MB in %.2f s",
            version,
            self._state_dir.saved_bytes / 1e6,
            took_s,
            extra={"version": version, "duration_s": took_s},
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of the newest snapshot's file; 0 before there is one."""
        return self._state_dir.saved_bytes

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
