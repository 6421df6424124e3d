"""The way of a restarted server back to where its run was, along pushes that are sent again.

A replay says in which version it was applied, and beside whom: who is believed decides of whom that
version is made again. So replays are believed for as long as the way back lasts, and no longer.

Not for several threads at once: the coordinator's lock guards it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from topq_dist.ps.protocol.types import Push
from topq_dist.ps.server.membership import Leases

# who has joined replays with the next step, and that may take longer than a lease
_LEASES_TO_STEP = 10


class Recovery:
    """The workers that come back to a server, and how far they are believed to have been.

    It is over once nobody is still to come, and a version is made that is no replay; at the latest
    10 leases after the last one came back, or two replays agreed.

    version: of the snapshot, which knows those that `leases` has now. clock: seconds.
    """

    def __init__(
        self, *, version: int, leases: Leases, lease_s: float, clock: Callable[[], float]
    ) -> None:
        self._version = version
        self._leases = leases
        self._clock = clock
        self._known = {member.worker for member in leases.all()}
        self._limit_s = _LEASES_TO_STEP * lease_s
        self._moved_s = clock()
        self._ended = False
        # what those that came back held then
        self._held: dict[str, int] = {}

    @property
    def is_late(self) -> bool:
        """Whether the time is over that it may take."""
        return self._clock() >= self._moved_s + self._limit_s

    @property
    def has_ended(self) -> bool:
        """Whether it has come to its end by itself."""
        return self._ended

    @property
    def is_over(self) -> bool:
        """Whether replays are not believed any more."""
        return self._ended or self.is_late

    @property
    def reached_version(self) -> int:
        """The latest version that was there, as far as it is known.

        One that the snapshot knows is believed that it holds it, and two others that agree.
        """
        known = [version for worker, version in self._held.items() if worker in self._known]
        others = sorted(self._held.values())[:-1]
        return max([self._version, *known, *others])

    def held(self) -> dict[str, int]:
        """Return what each live worker that the snapshot knows held when it came back."""
        live = self._leases.live(self._clock()) & self._known
        return {worker: version for worker, version in self._held.items() if worker in live}

    def note_join(self, worker: str, version: int) -> bool:
        """Note that a worker is joining, and holds `version`; return whether it comes back."""
        member = self._leases.get(worker)
        comes_back = member is not None and not member.has_joined
        if comes_back:
            self._moved_s = self._clock()
        if worker in self._known or version > self._version:
            # a new process of a name knows of nothing, until it has loaded a saved state
            self._held[worker] = max(self._held.get(worker, self._version), version)
        return comes_back

    def note_version(self, pushes: Sequence[Push]) -> None:
        """Note that a version was made of these."""
        replays = sum(push.applied_version > 0 for push in pushes)
        if replays > 1:
            self._moved_s = self._clock()
        if not replays and not self._leases.returning(self._clock()):
            self._ended = True

    def end(self) -> None:
        """Believe no replay from now on."""
        self._ended = True
