"""The workers of a run: whether one may speak, and whose model it is.

Not for several threads at once: the coordinator's lock guards it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.config import ServingConfig
from topq_dist.ps.protocol.errors import (
    FencedError,
    NotJoinedError,
    NotReadyError,
    TooLargeError,
    TooManyWorkersError,
    WrongRunError,
)
from topq_dist.ps.server.leases import Leases, Phase
from topq_dist.ps.server.requests import JoinCall, PushPermit, WorkerId
from topq_dist.ps.state.ledger import Entry, Ledger

_log = logging.getLogger(__name__)
# how long the others wait for the model, if they are not told that its bringer is gone
_LEASES_TO_UPLOAD = 10
_LEAST_RATE = 1 << 20  # bytes a second
NO_MODEL = "the run has no model yet: join again"


class Membership:
    """Decides who may join run `run`, speak in it, and push.

    spec: of its model, once somebody was told to bring one.
    """

    def __init__(
        self,
        serving: ServingConfig,
        *,
        run: str,
        ledger: Ledger,
        leases: Leases,
        spec: ModelSpec | None,
        clock: Callable[[], float],
    ) -> None:
        self.run = run
        self.ledger = ledger
        self.spec = spec
        self._serving = serving
        self._leases = leases
        self._clock = clock
        self._upload_end_s = 0.0

    def enter(self, call: JoinCall, *, has_model: bool) -> Entry:
        """Enter a worker into the ledger; raises RefusedError where it may not join."""
        if call.run != self.run and call.held is not None:
            raise WrongRunError(
                f"worker {call.worker!r} belongs to run {call.run!r} and this server's is "
                f"{self.run!r}: point it to its own server, or start it anew"
            )
        if not self._leases.has_room(call.worker, self._clock()):
            returning = self._leases.returning(self._clock()) - self._leases.only_expected()
            if returning:  # they may be gone
                raise NotReadyError(
                    f"worker {call.worker!r} has no place while the server waits for "
                    f"{', '.join(sorted(returning))} to come back, one lease at most: try again"
                )
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
        member = self._leases.get(call.worker)
        if member is None or not member.has_joined or entry.epoch != call.epoch:
            _log.info("worker %s joined, epoch %d", call.worker, entry.epoch)
        return entry

    def is_to_upload(self, call: JoinCall) -> bool:
        """Return whether this worker brings the model: the first, or the next if it does not."""
        if self._another_uploads(call.worker):
            return False
        uploader = self._leases.uploader()
        if uploader is None or uploader.worker != call.worker:
            limit_s = _LEASES_TO_UPLOAD * self._serving.lease_s
            limit_s += call.spec.raw_bytes / _LEAST_RATE
            self._upload_end_s = self._clock() + limit_s
        self._leases.set_uploader(call.worker)
        self.spec = call.spec
        return True

    def _another_uploads(self, worker: str) -> bool:
        now_s = self._clock()
        uploader = self._leases.uploader()
        if uploader is None or uploader.worker == worker or now_s >= self._upload_end_s:
            return False
        return uploader.phase(now_s) is Phase.UPLOADING

    def check_uploader(self, worker: str) -> None:
        """Raise NotReadyError unless this worker was told to bring the model."""
        uploader = self._leases.uploader()
        if uploader is None or uploader.worker != worker:
            name = None if uploader is None else uploader.worker
            raise NotReadyError(f"worker {name!r} brings the model: join again")

    def admit(
        self, caller: WorkerId, sequence: int, digest: bytes, *, has_model: bool
    ) -> PushPermit:
        """Return the permit of a push; raises RefusedError where it is not to be taken in."""
        self.check_caller(caller)
        if self.spec is None or not has_model:
            raise NotReadyError(NO_MODEL)
        verdict = self.ledger.check(caller.worker, caller.epoch, sequence, digest)
        return PushPermit(
            caller=caller,
            sequence=sequence,
            digest=digest,
            spec=self.spec,
            verdict=verdict,
            place=self._place(caller.worker),
        )

    def renew(self, permit: PushPermit) -> PushPermit:
        """Renew the lease of a permit's worker; return the permit that holds now.

        It is the same while the worker's place is the one that it was given for. Raises what
        `admit` would where it is not.
        """
        here, then = self._place(permit.caller.worker), permit.place
        if here[0] is not then[0] or here[1] is not then[1]:
            return self.admit(permit.caller, permit.sequence, permit.digest, has_model=True)
        self._leases.touch(permit.caller.worker, self._clock())
        return permit

    def _place(self, worker: str) -> tuple[object, object]:
        # another process or another push makes another entry, and who leaves another member
        return self._leases.get(worker), self.ledger.entry(worker)

    def check_caller(self, caller: WorkerId) -> None:
        """Renew the caller's lease; raises RefusedError unless it has a place in the run."""
        if caller.run != self.run:
            raise WrongRunError(
                f"worker {caller.worker!r} speaks of run {caller.run!r}: this server's is "
                f"{self.run!r}"
            )
        member = self._leases.get(caller.worker)
        if member is None or not member.has_joined:
            # after a restart too: the worker has to learn how far back the server is
            raise NotJoinedError(f"worker {caller.worker!r} has not joined this server: join first")
        entry = self.ledger.entry(caller.worker)
        if caller.epoch < entry.epoch:
            raise FencedError(
                f"worker {caller.worker!r} in epoch {caller.epoch}: a newer process has taken this "
                f"name, in epoch {entry.epoch}"
            )
        if caller.epoch > entry.epoch:
            raise NotJoinedError(f"worker {caller.worker!r} is not known in its epoch: join again")
        self._leases.touch(caller.worker, self._clock())

    def leave(self, caller: WorkerId) -> None:
        """Give the caller's place up, or nothing where it has left; raises RefusedError."""
        if self._leases.get(caller.worker) is not None:
            self.check_caller(caller)
            _log.info("worker %s left", caller.worker)
        elif caller.run != self.run or self.ledger.entry(caller.worker).epoch != caller.epoch:
            raise NotJoinedError(f"worker {caller.worker!r} has no place in this run")
        self._leases.remove(caller.worker)
