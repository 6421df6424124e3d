"""When a version is made, and of which pushes: rules that look and decide, and change nothing.

Both rules are asked again and again until they have nothing more to decide. Neither waits: where a
lease or a time runs out, whoever waits asks again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from topq_dist.ps.protocol.types import Point, Push


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What a rule decides on.

    point: the present one. pending: pushes by worker, in the order of arrival; each is its
    worker's next. waiting_since_s: when a round's time began, None where it has no push yet.
    live: workers whose lease runs. returning: those of them that have not joined this server yet.
    on_chain: whether a point lies on the way to the present one.
    joined: how many workers ever joined.
    """

    point: Point
    pending: Mapping[str, Push]
    live: frozenset[str]
    returning: frozenset[str]
    joined: int
    on_chain: Callable[[Point], bool]
    waiting_since_s: float | None
    now_s: float


@dataclass(frozen=True)
class Apply:
    """Make the next version of these workers' pushes."""

    workers: tuple[str, ...]


@dataclass(frozen=True)
class Refuse:
    """Refuse these workers' pushes as stale."""

    workers: tuple[str, ...]


@dataclass(frozen=True)
class Wait:
    """Wait for these workers."""

    workers: tuple[str, ...]


Decision = Apply | Refuse | Wait


@dataclass(frozen=True, kw_only=True)
class SyncRule:
    """One push of each live worker a version, all computed on the same point.

    A replay says beside whom it was applied: then the version is made of those again, as far as
    they still come. A push on a version to come is a replay too, or follows one: it waits for the
    others to bring the server there, and is stale where they cannot.
    """

    start_workers: int
    min_workers: int
    round_timeout_s: float | None

    def size(self, now: Situation) -> int:
        """Return how many pushes the next version is to be made of, as far as is known now."""
        stated = stated_members(now)
        if stated:
            return len(stated)
        least = self.start_workers if self._too_early(now) else 1
        return max(least, self.min_workers, len(now.live | now.pending.keys()))

    def decide(self, now: Situation) -> Decision:
        """Return what is to be done next."""
        past = [
            worker
            for worker, push in now.pending.items()
            if push.base.version <= now.point.version and push.base != now.point
        ]
        if past:
            return Refuse(tuple(past))
        ready = {worker for worker, push in now.pending.items() if push.base == now.point}
        ahead = now.pending.keys() - ready
        stated = stated_members(now)
        if stated:
            come = ready & stated
            missing = (stated & now.live) - ready - ahead
            if come == stated or (not missing and len(come) >= self.min_workers):
                return Apply(tuple(sorted(come)))
            if missing:
                return Wait(tuple(sorted(missing)))
            # too few of them are left: whoever else is there makes the version with them
        missing = now.live - ready - ahead
        too_early = self._too_early(now)
        too_few = len(ready) < self.min_workers
        if ahead and not missing and (not ready or (too_few and not too_early)):
            return Refuse(tuple(sorted(ahead)))
        if not ready or too_early or too_few:
            return Wait(tuple(sorted(missing)))
        if not missing or self._timed_out(now):
            return Apply(tuple(sorted(ready)))
        return Wait(tuple(sorted(missing)))

    def _too_early(self, now: Situation) -> bool:
        return now.point.version == 0 and now.joined < self.start_workers

    def _timed_out(self, now: Situation) -> bool:
        # who comes back after a restart may bring a replay, which says who belongs to the round
        if self.round_timeout_s is None or now.waiting_since_s is None or now.returning:
            return False
        return now.now_s - now.waiting_since_s >= self.round_timeout_s


def stated_members(now: Situation) -> frozenset[str]:
    """Return whom replays of the next version name as its members; empty where there are none."""
    return frozenset(
        member
        for push in now.pending.values()
        if push.base == now.point and push.applied_version == now.point.version + 1
        for member in push.members
    )


@dataclass(frozen=True, kw_only=True)
class AsyncRule:
    """Each push is a version of its own, unless it lags more than `max_staleness` behind."""

    max_staleness: int

    def decide(self, now: Situation) -> Decision:
        """Return what is to be done next, where nothing is being recovered."""
        for worker, push in now.pending.items():
            return self._take(now, worker, push)
        return Wait(())

    def recover(self, now: Situation) -> Decision | None:
        """Return what is to be done next on the way back to where the run was; None: we are there.

        Replays are applied where they were before. Where one is missing for good (its worker is
        gone too), pushes that were never answered may have been there, and take its place; then
        the earliest of what is left does.
        """
        for worker, push in now.pending.items():
            if push.applied_version == now.point.version + 1:
                return self._take(now, worker, push)
        missing = (now.live - now.pending.keys()) | now.returning
        if missing:
            return Wait(tuple(sorted(missing)))
        replays = {worker: push for worker, push in now.pending.items() if push.applied_version > 0}
        if not replays:
            return None
        unanswered = sorted(
            worker
            for worker in now.pending.keys() - replays.keys()
            if now.pending[worker].base.version <= now.point.version
        )
        if unanswered:
            return self._take(now, unanswered[0], now.pending[unanswered[0]])
        worker = min(replays, key=lambda name: (replays[name].applied_version, name))
        return self._take(now, worker, replays[worker])

    def _take(self, now: Situation, worker: str, push: Push) -> Decision:
        lag = now.point.version - push.base.version
        if 0 <= lag <= self.max_staleness and now.on_chain(push.base):
            return Apply((worker,))
        return Refuse((worker,))
