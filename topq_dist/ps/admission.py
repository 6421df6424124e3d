"""Who may speak in a run, and whose model it is.

Not for several threads at once: the coordinator's lock guards it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from topq_dist.ps.calls import Caller, JoinCall
from topq_dist.ps.config import ServingConfig
from topq_dist.ps.ledger import Entry, Ledger
from topq_dist.ps.members import Members
from topq_dist.ps.model import ModelSpec
from topq_dist.ps.protocol import (
    NotJoinedError,
    NotReadyError,
    OldEpochError,
    TooLargeError,
    TooManyWorkersError,
    WrongRunError,
)

_log = logging.getLogger(__name__)
# how long the others wait for the model, if they are not told that its bringer is gone
_LEASES_TO_UPLOAD = 10
_LEAST_RATE = 1 << 20  # bytes a second


class Admission:
    """The door of run `run`. spec: of its model, once somebody was told to bring one."""

    def __init__(
        self,
        serving: ServingConfig,
        *,
        run: str,
        ledger: Ledger,
        members: Members,
        spec: ModelSpec | None,
        clock: Callable[[], float],
    ) -> None:
        self.run = run
        self.ledger = ledger
        self.spec = spec
        self._serving = serving
        self._members = members
        self._clock = clock
        self._uploader: str | None = None
        self._upload_end_s = 0.0

    def enter(self, call: JoinCall, *, has_model: bool) -> Entry:
        """Enter a worker into the ledger; raises RefusedError where it may not join."""
        if call.run != self.run and call.held is not None:
            raise WrongRunError(
                f"worker {call.worker!r} belongs to run {call.run!r} and this server's is "
                f"{self.run!r}: point it to its own server, or start it anew"
            )
        if not self._members.has_room(call.worker, self._clock()):
            raise TooManyWorkersError(
                f"worker {call.worker!r} would be one too many: expected at most "
                f"max_workers={self._serving.max_workers} at a time"
            )
        if self.spec is not None and (has_model or self._another_uploads(call.worker)):
            call.spec.check_same(self.spec)
        elif call.spec.raw_bytes > self._serving.max_model_bytes:
            raise TooLargeError(
                f"a model of {call.spec.raw_bytes} bytes: expected at most "
                f"max_model_bytes={self._serving.max_model_bytes}"
            )
        entry = self.ledger.join(
            call.worker, call.instance, call.epoch, call.first_kept or call.next_sequence
        )
        member = self._members.get(call.worker)
        if member is None or not member.joined or entry.epoch != call.epoch:
            _log.info("worker %s joined, epoch %d", call.worker, entry.epoch)
        return entry

    def is_to_upload(self, call: JoinCall) -> bool:
        """Return whether this worker brings the model: the first, or the next if it does not."""
        if self._another_uploads(call.worker):
            return False
        if self._uploader != call.worker:
            patience_s = _LEASES_TO_UPLOAD * self._serving.lease_s
            patience_s += call.spec.raw_bytes / _LEAST_RATE
            self._upload_end_s = self._clock() + patience_s
        self._uploader, self.spec = call.worker, call.spec
        return True

    def _another_uploads(self, worker: str) -> bool:
        now_s = self._clock()
        if self._uploader in (None, worker) or now_s >= self._upload_end_s:
            return False
        return self._uploader in self._members.live(now_s)

    def check_uploader(self, worker: str) -> None:
        """Raise NotReadyError unless this worker was told to bring the model."""
        if self._uploader != worker:
            raise NotReadyError(f"worker {self._uploader!r} brings the model: join again")

    def check_caller(self, caller: Caller) -> None:
        """Renew the caller's lease; raises RefusedError unless it has a place in the run."""
        if caller.run != self.run:
            raise WrongRunError(
                f"worker {caller.worker!r} speaks of run {caller.run!r}: this server's is "
                f"{self.run!r}"
            )
        member = self._members.get(caller.worker)
        if member is None or not member.joined:
            # after a restart too: the worker has to learn how far back the server is
            raise NotJoinedError(f"worker {caller.worker!r} has not joined this server: join first")
        entry = self.ledger.entry(caller.worker)
        if caller.epoch < entry.epoch:
            raise OldEpochError(
                f"worker {caller.worker!r} in epoch {caller.epoch}: a newer process has taken this "
                f"name, in epoch {entry.epoch}"
            )
        if caller.epoch > entry.epoch:
            raise NotJoinedError(f"worker {caller.worker!r} is not known in its epoch: join again")
        self._members.touch(caller.worker, self._clock())

    def leave(self, caller: Caller) -> None:
        """Give the caller's place up, or nothing where it has left; raises RefusedError."""
        if self._members.get(caller.worker) is not None:
            self.check_caller(caller)
            _log.info("worker %s left", caller.worker)
        elif caller.run != self.run or self.ledger.entry(caller.worker).epoch != caller.epoch:
            raise NotJoinedError(f"worker {caller.worker!r} has no place in this run")
        self._members.remove(caller.worker)
        if self._uploader == caller.worker:
            self._uploader = None
