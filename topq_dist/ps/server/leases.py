"""The members of a run, and their leases.

Not for several threads at once: the coordinator's lock guards it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from enum import Enum, auto


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
        soonest_s = float("inf")
        for member in self._by_name.values():  # once a push: a generator takes twice as long
            if now_s < member.lease_end_s < soonest_s:
                soonest_s = member.lease_end_s
        return soonest_s
