"""The way of a restarted server back to where its run was, along pushes that are sent again.

A replay says in which version it was applied, and beside whom: who is believed decides of whom that
version is made again. So replays are believed for as long as the way back lasts, and no longer.

Not for several threads at once: the coordinator's lock guards it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from topq_dist.ps.protocol.types import Push
from topq_dist.ps.server.leases import Leases

# who has joined replays with the next step, and that may take longer than a lease
_LEASES_TO_STEP = 10


class Recovery:
    """The workers that come back to a server, and how far they are believed to have been.

    It is over once nobody is still to come, and a version is made that is no replay; at the latest
    10 leases after the last one came back, two replays agreed, or all of them had brought one.

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
        # whose replays were applied since it last moved
        self._replayed: set[str] = set()
        # what workers said that they hold when they joined
        self._held: dict[str, int] = {}
        # whether all that the snapshot knows have come back, and the server is where they are
        self._caught_up = False

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
        known = [held for worker, held in self._held.items() if worker in self._known]
        others = sorted(self._held.values())[:-1]
        return max([self._version, *known, *others])

    def held_by(self, worker: str) -> int:
        """Return the version that this worker said that it holds, when it joined; 0: none."""
        return self._held.get(worker, 0)

    def held(self) -> dict[str, int]:
        """Return what each live worker that the snapshot knows held when it came back.

        A new process of a name knows of nothing, until it has loaded a saved state.
        """
        come = (self._leases.get(worker) for worker in self._live())
        return {
            one.worker: self._held.get(one.worker, self._version)
            for one in come
            if one is not None and one.has_joined
        }

    def _live(self) -> frozenset[str]:
        return self._leases.live(self._clock()) & self._known

    def note_join(self, worker: str, version: int | None) -> bool:
        """Note that a worker is joining, and holds `version`; return whether it comes back."""
        member = self._leases.get(worker)
        comes_back = member is not None and not member.has_joined
        if comes_back:
            self._moved_s = self._clock()
        # who has caught up, and says then that it holds more, has thought of it since
        late = self._caught_up and worker in self._known
        if version is not None and not late:
            self._held[worker] = max(self._held.get(worker, 0), version)
        return comes_back

    def note_version(self, version: int, pushes: Sequence[Push]) -> None:
        """Note that a version of sync mode was made of these."""
        self.note_replays(pushes)
        replays = any(push.applied_version > 0 for push in pushes)
        if not replays and not self._leases.returning(self._clock()):
            self._ended = True
        self.look(version)

    def note_replays(self, pushes: Sequence[Push]) -> None:
        """Note that these were applied; the way back goes on while all those known bring theirs."""
        replayed = {push.worker for push in pushes if push.applied_version > 0}
        self._replayed |= replayed
        # one alone may take its time where the run has nobody else
        if len(replayed) > 1 or (self._known and self._known <= self._replayed):
            self._moved_s = self._clock()
            self._replayed.clear()

    def look(self, version: int) -> None:
        """See whether those who come back are all where the server is, at `version`."""
        self._caught_up = self._caught_up or all(
            worker in self._held and self._held[worker] <= version for worker in self._live()
        )

    def end(self) -> None:
        """Believe no replay from now on."""
        self._ended = True
