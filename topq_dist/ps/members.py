"""Who is in the run: the workers' leases, and what each has sent and been sent."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass


@dataclass(kw_only=True)
class Member:
    """A worker with a place in the run.

    lease_end_s: on the caller's clock. joined: to this server, and not only known to it from the
    snapshot. held_version: what the worker was last known to hold.
    """

    worker: str
    lease_end_s: float
    joined: bool = False
    held_version: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0


class Members:
    """The members by name. Times are seconds on one clock, the caller's."""

    def __init__(self, *, lease_s: float, max_workers: int) -> None:
        self._lease_s = lease_s
        self._max_workers = max_workers
        self._by_name: dict[str, Member] = {}
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

    def any_live_but(self, workers: Container[str], now_s: float) -> bool:
        """Return whether the lease of any other than `workers` has not ended."""
        for worker, member in self._by_name.items():
            if member.lease_end_s > now_s and worker not in workers:
                return True
        return False

    def has_room(self, worker: str, now_s: float) -> bool:
        """Return whether `worker` may be live beside those who are."""
        return len(self.live(now_s) - {worker}) < self._max_workers

    def add(self, workers: Iterable[str], now_s: float) -> None:
        """Give workers that this server only knows of a place and a lease."""
        for worker in workers:
            self._by_name[worker] = Member(worker=worker, lease_end_s=now_s + self._lease_s)

    def expect(self, workers: Iterable[str], now_s: float) -> None:
        """Give workers of whom others speak a lease to come back in, once in a server's life."""
        fresh = [worker for worker in workers if worker not in self._by_name]
        fresh = [worker for worker in fresh if worker not in self._expected]
        fresh = fresh[: self._max_workers - len(self._expected)]
        self._expected.update(fresh)
        self.add(fresh, now_s)

    def join(self, worker: str, *, held_version: int, now_s: float) -> None:
        """Take a worker in, or back; a crowd of members that are gone makes room."""
        if worker not in self._by_name:
            gone = [member for member in self.all() if member.lease_end_s <= now_s]
            gone.sort(key=lambda member: member.lease_end_s)
            for member in gone[: max(0, len(self._by_name) + 1 - self._max_workers)]:
                del self._by_name[member.worker]
            self.add([worker], now_s)
        member = self._by_name[worker]
        member.joined = True
        member.held_version = held_version
        self.touch(worker, now_s)

    def touch(self, worker: str, now_s: float) -> None:
        """Renew the lease of a worker that was heard of; nothing where it has no place."""
        member = self._by_name.get(worker)
        if member is not None:
            member.lease_end_s = max(member.lease_end_s, now_s + self._lease_s)

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
