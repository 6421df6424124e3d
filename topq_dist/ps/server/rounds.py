"""Policies of when a version is made and of which pushes: they look and decide, and change nothing.

Both are asked again and again until they have nothing more to decide. Neither waits: where a lease
or a time runs out, whoever waits asks again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from topq_dist.ps.protocol.types import ModelVersion, Push


@dataclass(frozen=True, kw_only=True)
class RoundView:
    """The state of a round, as far as a policy decides on it.

    point: the present one. pending: pushes by worker, in the order of arrival; each is its
    worker's next. waiting_since_s: when a round's time began, None where it has no push yet.
    live: workers whose lease runs. returning: those of them that have not joined this server yet.
    on_chain: whether a point lies on the way to the present one.
    joined: how many workers ever joined.
    believed_version: the last that is believed to have been there before; 0: none but the present.
    held: on the way back after a restart, what each live worker held when it came back. held_by:
    returns what any worker said that it holds when it joined.
    """

    point: ModelVersion
    pending: Mapping[str, Push]
    live: frozenset[str]
    returning: frozenset[str]
    joined: int
    on_chain: Callable[[ModelVersion], bool]
    waiting_since_s: float | None
    now_s: float
    believed_version: int = 0
    held: Mapping[str, int] = field(default_factory=dict)
    held_by: Callable[[str], int] = lambda worker: 0


@dataclass(frozen=True)
class Apply:
    """Make the next version of these workers' pushes; `passed_over` have had their time."""

    workers: tuple[str, ...]
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refuse:
    """Answer these workers' pushes as stale. reason: counts them."""

    workers: tuple[str, ...]
    reason: str = "stale"


@dataclass(frozen=True)
class Wait:
    """Wait for these workers."""

    workers: tuple[str, ...]


Decision = Apply | Refuse | Wait
# of a push that goes by what was before a restart, where that is not to be believed
UNBELIEVED = "unbelieved_replay"


@dataclass(frozen=True, kw_only=True)
class SyncPolicy:
    """One push of each live worker a version, all computed on the same point.

    A replay says beside whom it was applied: where it is believed, the version is made of those
    again, as far as they still come. A push on a version to come is a replay too, or follows one:
    it waits for the others to bring the server there, and is stale where they cannot.
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
        unbelieved = [worker for worker, push in view.pending.items() if _is_unbelieved(view, push)]
        if unbelieved:
            return Refuse(tuple(unbelieved), UNBELIEVED)
        ready = {worker for worker, push in view.pending.items() if push.base == view.point}
        ahead = view.pending.keys() - ready
        replays = replays_of_next(view)
        if replays:
            decision = self._decide_replays(view, replays, ready, ahead)
            if decision is not None:
                return decision
            # too few of them are left: whoever else is there makes the version with them
        missing = view.live - ready - ahead
        too_early = self._too_early(view)
        too_few = len(ready) < self.min_workers
        if ahead and not missing and (not ready or (too_few and not too_early)):
            return Refuse(tuple(sorted(ahead)))
        if not ready or too_early or too_few:
            return Wait(tuple(sorted(missing)))
        if not missing or self._timed_out(view):
            return Apply(tuple(sorted(ready)), tuple(sorted(missing)))
        return Wait(tuple(sorted(missing)))

    def _decide_replays(
        self,
        view: RoundView,
        replays: Mapping[str, frozenset[str]],
        ready: AbstractSet[str],
        ahead: AbstractSet[str],
    ) -> Decision | None:
        """Return what is to be done where replays of the next version are there; None: go on."""
        if view.returning:
            return Wait(tuple(sorted(view.returning)))
        version, stated = view.point.version + 1, stated_members(view)
        # who held it, and is silent as yet, knows whether it was in it
        asked = (stated & view.live) | {one for one, held in view.held.items() if held >= version}
        missing = asked - ready - ahead
        if missing and not self._timed_out(view):
            return Wait(tuple(sorted(missing)))
        contested = [worker for worker in replays if _is_contested(view, replays, worker)]
        if contested:
            return Refuse(tuple(sorted(contested)), UNBELIEVED)
        come = ready & stated
        if come == stated or len(come) >= self.min_workers:
            return Apply(tuple(sorted(come)), tuple(sorted(missing)))
        return None

    def _too_early(self, view: RoundView) -> bool:
        return view.point.version == 0 and view.joined < self.start_workers

    def _timed_out(self, view: RoundView) -> bool:
        # who comes back after a restart may bring a replay, which says who belongs to the round
        if self.round_timeout_s is None or view.waiting_since_s is None or view.returning:
            return False
        return view.now_s - view.waiting_since_s >= self.round_timeout_s


def replays_of_next(view: RoundView) -> dict[str, frozenset[str]]:
    """Return whose pushes say that they were in the next version before, and beside whom."""
    return {
        worker: frozenset(push.members)
        for worker, push in view.pending.items()
        if push.base == view.point and push.applied_version == view.point.version + 1
    }


def stated_members(view: RoundView) -> frozenset[str]:
    """Return whom replays of the next version name as its members; empty where there are none."""
    return frozenset().union(*replays_of_next(view).values())


def _is_unbelieved(view: RoundView, push: Push) -> bool:
    """Return whether a push goes by a version that nobody is believed to have seen."""
    if view.returning:  # one of them may have
        return False
    seen = max(view.point.version, view.believed_version)
    return max(push.base.version, push.applied_version) > seen or (
        push.applied_version > 0
        and (
            push.applied_version != push.base.version + 1
            or push.applied_version > view.held_by(push.worker)
        )
    )


def _is_contested(view: RoundView, replays: Mapping[str, frozenset[str]], worker: str) -> bool:
    """Return whether a replay leaves out a worker that says or knows otherwise.

    One alone is not believed to have gone far ahead of others that came back: it would decide on
    the model by itself.
    """
    version, members = view.point.version + 1, replays[worker]

    def support(members: frozenset[str]) -> tuple[int, int]:
        who = [one for one, stated in replays.items() if stated == members]
        return sum(one in view.held for one in who), len(who)

    alone = support(members)[1] == 1
    return any(
        other not in members and support(stated) >= support(members)
        for other, stated in replays.items()
    ) or any(
        other not in members and alone and (worker not in view.held or version > held + 1)
        for other, held in view.held.items()
    )


@dataclass(frozen=True, kw_only=True)
class AsyncPolicy:
    """Each push is a version of its own, unless it lags more than `max_staleness` behind."""

    max_staleness: int

    def decide(self, view: RoundView) -> Decision:
        """Return what is to be done next, where nothing is being recovered."""
        # taken in while they were believed, at rates that were not looked at
        unbelieved = [worker for worker, push in view.pending.items() if push.applied_version > 0]
        if unbelieved:
            return Refuse(tuple(unbelieved), UNBELIEVED)
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
