"""Policies of when a version is made and of which pushes: they look and decide, and change nothing.

Both are asked again and again until they have nothing more to decide. Neither waits: where a lease
or a time runs out, whoever waits asks again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from topq_dist.ps.protocol.types import ModelVersion, Push


@dataclass(frozen=True, kw_only=True)
class RoundView:
    """The state of a round, as far as a policy decides on it.

    point: the present one. pending: pushes by worker, in the order of arrival; each is its
    worker's next. waiting_since_s: when a round's time began, None where it has no push yet.
    live: workers whose lease runs. returning: those of them that have not joined this server yet.
    on_chain: whether a point lies on the way to the present one.
    joined: how many workers ever joined.
    """

    point: ModelVersion
    pending: Mapping[str, Push]
    live: frozenset[str]
    returning: frozenset[str]
    joined: int
    on_chain: Callable[[ModelVersion], bool]
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
class SyncPolicy:
    """One push of each live worker a version, all computed on the same point.

    A replay says beside whom it was applied: then the version is made of those again, as far as
    they still come. A push on a version to come is a replay too, or follows one: it waits for the
    others to bring the server there, and is stale where they cannot.
    """

    start_workers: int
    min_workers: int
    round_timeout_s: float | None

    def size(self, view: RoundView) -> int:
        """Return how many pushes the next version is to be made of, as far as is known now."""
        stated = stated_members(view)
        if stated:
            return len(stated)
        least = self.start_workers if self._too_early(view) else 1
        return max(least, self.min_workers, len(view.live | view.pending.keys()))

    def decide(self, view: RoundView) -> Decision:
        """Return what is to be done next."""
        past = [
            worker
            for worker, push in view.pending.items()
            if push.base.version <= view.point.version and push.base != view.point
        ]
        if past:
            return Refuse(tuple(past))
        ready = {worker for worker, push in view.pending.items() if push.base == view.point}
        ahead = view.pending.keys() - ready
        stated = stated_members(view)
        if stated:
            come = ready & stated
            missing = (stated & view.live) - ready - ahead
            if come == stated or (not missing and len(come) >= self.min_workers):
                return Apply(tuple(sorted(come)))
            if missing:
                return Wait(tuple(sorted(missing)))
            # too few of them are left: whoever else is there makes the version with them
        missing = view.live - ready - ahead
        too_early = self._too_early(view)
        too_few = len(ready) < self.min_workers
        if ahead and not missing and (not ready or (too_few and not too_early)):
            return Refuse(tuple(sorted(ahead)))
        if not ready or too_early or too_few:
            return Wait(tuple(sorted(missing)))
        if not missing or self._timed_out(view):
            return Apply(tuple(sorted(ready)))
        return Wait(tuple(sorted(missing)))

    def _too_early(self, view: RoundView) -> bool:
        return view.point.version == 0 and view.joined < self.start_workers

    def _timed_out(self, view: RoundView) -> bool:
        # who comes back after a restart may bring a replay, which says who belongs to the round
        if self.round_timeout_s is None or view.waiting_since_s is None or view.returning:
            return False
        return view.now_s - view.waiting_since_s >= self.round_timeout_s


def stated_members(view: RoundView) -> frozenset[str]:
    """Return whom replays of the next version name as its members; empty where there are none."""
    return frozenset(
        member
        for push in view.pending.values()
        if push.base == view.point and push.applied_version == view.point.version + 1
        for member in push.members
    )


@dataclass(frozen=True, kw_only=True)
class AsyncPolicy:
    """Each push is a version of its own, unless it lags more than `max_staleness` behind."""

    max_staleness: int

    def decide(self, view: RoundView) -> Decision:
        """Return what is to be done next, where nothing is being recovered."""
        for worker, push in view.pending.items():
            return self._take(view, worker, push)
        return Wait(())

    def recover(self, view: RoundView) -> Decision | None:
        """Return what is to be done next on the way back to where the run was; None: we are there.

        Replays are applied where they were before. Where one is missing for good (its worker is
        gone too), pushes that were never answered may have been there, and take its place; then
        the earliest of what is left does.
        """
        for worker, push in view.pending.items():
            if push.applied_version == view.point.version + 1:
                return self._take(view, worker, push)
        missing = (view.live - view.pending.keys()) | view.returning
        if missing:
            return Wait(tuple(sorted(missing)))
        replays = {
            worker: push for worker, push in view.pending.items() if push.applied_version > 0
        }
        if not replays:
            return None
        unanswered = sorted(
            worker
            for worker in view.pending.keys() - replays.keys()
            if view.pending[worker].base.version <= view.point.version
        )
        if unanswered:
            return self._take(view, unanswered[0], view.pending[unanswered[0]])
        worker = min(replays, key=lambda name: (replays[name].applied_version, name))
        return self._take(view, worker, replays[worker])

    def _take(self, view: RoundView, worker: str, push: Push) -> Decision:
        lag = view.point.version - push.base.version
        if 0 <= lag <= self.max_staleness and view.on_chain(push.base):
            return Apply((worker,))
        return Refuse((worker,))
