"""The workers of a run: their leases, whether one may speak, and whose model it is.

Not for several threads at once: the coordinator's lock guards it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from enum import Enum, auto

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
from topq_dist.ps.server.requests import JoinCall, PushPermit, WorkerId
from topq_dist.ps.state.ledger import Entry, Ledger

_log = logging.getLogger(__name__)
# how long the others wait for the model, if they are not told that its bringer is gone
_LEASES_TO_UPLOAD = 10
_LEAST_RATE = 1 << 20  # bytes a second
NO_MODEL = "the run has no model yet: join again"


class Phase(Enum):
    """The phases of a worker, from the first that is heard of it to the last.

    EXPECTED: others' replays name it, and it has a lease to come back in, once in a server's life.
    RETURNING: the snapshot has it among the live, and it has not joined this server yet.
    JOINED: it has joined this server.
    UPLOADING: it has joined, and was told to bring the model.
    GONE: its lease has ended. A call of it, in time, makes it JOINED or UPLOADING again.
    """

    EXPECTED = auto()
    RETURNING = auto()
    JOINED = auto()
    UPLOADING = auto()
    GONE = auto()


@dataclass(kw_only=True)
class Member:
    """A worker with a place in the run.

    lease_end_s: on the caller's clock. entered_as: its phase while the lease runs. held_version:
    what the worker was last known to hold.
    """

    worker: str
    lease_end_s: float
    entered_as: Phase
    held_version: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0

    @property
    def has_joined(self) -> bool:
        """Whether it has joined this server, be its lease over or not."""
        return self.entered_as in (Phase.JOINED, Phase.UPLOADING)

    def phase(self, now_s: float) -> Phase:
        """Return its phase at a time on the clock of the leases."""
        return self.entered_as if self.lease_end_s > now_s else Phase.GONE


class Leases:
    """The members by name, and their leases. Times are seconds on one clock, the caller's."""

    def __init__(self, *, lease_s: float, max_workers: int) -> None:
        self._lease_s = lease_s
        self._max_workers = max_workers
        self._by_name: dict[str, Member] = {}
        # whom replays ever named
        self._expected: set[str] = set()

    def all(self) -> tuple[Member, ...]:
        """Return all members in the order of names, those whose lease has ended too."""
        return tuple(self._by_name[worker] for worker in sorted(self._by_name))

    def get(self, worker: str) -> Member | None:
        """Return the worker's place, or None."""
        return self._by_name.get(worker)

    def live(self, now_s: float) -> frozenset[str]:
        """Return the names of those whose lease has not ended."""
        return frozenset(
            worker for worker, member in self._by_name.items() if member.lease_end_s > now_s
        )

    def joined(self, now_s: float) -> list[str]:
        """Return the names of the live that have joined this server."""
        return [
            worker
            for worker, member in self._by_name.items()
            if member.lease_end_s > now_s and member.has_joined
        ]

    def returning(self, now_s: float) -> frozenset[str]:
        """Return the names of the live that have not joined this server yet."""
        return frozenset(
            worker
            for worker, member in self._by_name.items()
            if member.phase(now_s) in (Phase.EXPECTED, Phase.RETURNING)
        )

    def only_expected(self) -> frozenset[str]:
        """Return the names of those of whom others have spoken, and nobody else."""
        members = self._by_name.values()
        return frozenset(one.worker for one in members if one.entered_as is Phase.EXPECTED)

    def uploader(self) -> Member | None:
        """Return who was told to bring the model, be its lease over or not; None: nobody."""
        found = (one for one in self._by_name.values() if one.entered_as is Phase.UPLOADING)
        return next(found, None)

    def set_uploader(self, worker: str) -> None:
        """Make this worker, which has joined, the only one to bring the model."""
        before = self.uploader()
        if before is not None:
            before.entered_as = Phase.JOINED
        member = self._by_name.get(worker)
        if member is not None:
            member.entered_as = Phase.UPLOADING

    def any_live_but(self, workers: Container[str], now_s: float) -> bool:
        """Return whether the lease of any other than `workers` has not ended."""
        for worker, member in self._by_name.items():
            if member.lease_end_s > now_s and worker not in workers:
                return True
        return False

    def has_room(self, worker: str, now_s: float) -> bool:
        """Return whether `worker` may be live beside those who are; named ones take no place."""
        phases = (one.phase(now_s) for one in self._by_name.values() if one.worker != worker)
        return sum(phase not in (Phase.EXPECTED, Phase.GONE) for phase in phases) < (
            self._max_workers
        )

    def add(self, workers: Iterable[str], phase: Phase, now_s: float) -> None:
        """Give workers a place and a lease."""
        for worker in workers:
            self._by_name[worker] = Member(
                worker=worker, lease_end_s=now_s + self._lease_s, entered_as=phase
            )

    def expect(self, workers: Iterable[str], now_s: float) -> None:
        """Give workers of whom others speak a lease to come back in, once in a server's life."""
        fresh = [worker for worker in workers if worker not in self._by_name]
        fresh = [worker for worker in fresh if worker not in self._expected]
        fresh = fresh[: self._max_workers - len(self._expected)]
        self._expected.update(fresh)
        self.add(fresh, Phase.EXPECTED, now_s)

    def join(self, worker: str, *, held_version: int, now_s: float) -> None:
        """Take a worker in, or back; a crowd of members that are gone makes room."""
        if worker not in self._by_name:
            gone = [member for member in self.all() if member.lease_end_s <= now_s]
            gone.sort(key=lambda member: member.lease_end_s)
            for member in gone[: max(0, len(self._by_name) + 1 - self._max_workers)]:
                del self._by_name[member.worker]
            self.add([worker], Phase.JOINED, now_s)
        member = self._by_name[worker]
        if not member.has_joined:
            member.entered_as = Phase.JOINED
        member.held_version = held_version
        self.touch(worker, now_s)

    def touch(self, worker: str, now_s: float) -> None:
        """Renew the lease of a worker that was heard of; nothing where it has no place."""
        member = self._by_name.get(worker)
        if member is not None:
            member.lease_end_s = max(member.lease_end_s, now_s + self._lease_s)

    def renew_live(self, now_s: float) -> None:
        """Begin the lease of everybody anew whose lease has not ended; takes no lock."""
        for member in list(self._by_name.values()):
            if member.lease_end_s > now_s:
                self.touch(member.worker, now_s)

    def extend(self, seconds: float) -> None:
        """Lengthen every lease, for the time in which the server itself heard nobody."""
        for member in self._by_name.values():
            member.lease_end_s += seconds

    def remove(self, worker: str) -> None:
        """Give the worker's place up."""
        self._by_name.pop(worker, None)

    def next_end_s(self, now_s: float) -> float:
        """Return when the next lease ends; infinity where none runs."""
        ends = (member.lease_end_s for member in self._by_name.values())
        return min((end for end in ends if end > now_s), default=float("inf"))


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
