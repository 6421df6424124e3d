"""Pushes between their arrival and their version, and the way back after a restart.

Not for several threads at once: the coordinator's lock guards it.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from topq_dist.profiling import labelled
from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig
from topq_dist.ps.protocol.errors import (
    DigestDiffersError,
    InvalidError,
    NonFiniteError,
    NotReadyError,
    RefusedError,
)
from topq_dist.ps.protocol.types import Answer, ModelVersion, Push
from topq_dist.ps.server.leases import Leases
from topq_dist.ps.server.recovery import Recovery
from topq_dist.ps.server.rounds import (
    Apply,
    AsyncPolicy,
    Decision,
    RoundView,
    SyncPolicy,
    Wait,
    replays_of_next,
)
from topq_dist.ps.server.run_counters import RunCounters
from topq_dist.ps.state.run_state import RunState
from topq_dist.ps.training.step_guard import NonFiniteStepError

_log = logging.getLogger(__name__)
FAILED = "the server has failed: it has to be started again"


class Waiters:
    """The threads that wait for something: a lock each, free once its thread is to look again.

    A threading.Event does the same for three times the processor time, once for every push.
    """

    def __init__(self) -> None:
        self._locks: list[threading.Lock] = []

    def add(self) -> threading.Lock:
        """Return a lock for the calling thread: acquire it before each look, and to wait."""
        lock = threading.Lock()
        self._locks.append(lock)
        return lock

    def drop(self, lock: threading.Lock) -> None:
        """Forget a thread that waits no more."""
        self._locks.remove(lock)

    def wake(self) -> None:
        """Have all look again, also those between a look and their wait; never blocks."""
        for lock in tuple(self._locks):
            with suppress(RuntimeError):  # it is free already
                lock.release()


@dataclass(eq=False, kw_only=True)
class PendingPush:
    """A push that was taken in: `outcome` is set once it is decided.

    waiters: those who wait for the outcome, or for what else ends their wait.
    """

    worker: str
    push: Push = field(repr=False)  # until it is decided
    arrived_s: float
    waiters: Waiters = field(default_factory=Waiters)
    outcome: Answer | RefusedError | None = None

    def resolve(self, outcome: Answer | RefusedError) -> None:
        """Set the outcome, and let go of the push, gradient and all."""
        self.outcome = outcome
        del self.push
        self.waiters.wake()


class PushQueue:
    """The undecided pushes of a run, at most one of each worker.

    recovery: the way back of a restarted server; None where nothing is lost. clock: seconds.
    made: called after each new version. counters: what becomes of pushes is counted there.
    """

    def __init__(
        self,
        training: TrainingConfig,
        serving: ServingConfig,
        state: RunState,
        leases: Leases,
        *,
        recovery: Recovery | None,
        clock: Callable[[], float],
        made: Callable[[], None],
        counters: RunCounters,
    ) -> None:
        self._state = state
        self._leases = leases
        self._clock = clock
        self._made = made
        self._counters = counters
        self._recovery = recovery
        self._round_timeout_s = math.inf
        if serving.round_timeout_s is not None:
            self._round_timeout_s = serving.round_timeout_s
        self._returned_s = -math.inf
        self._pending: dict[str, PendingPush] = {}
        self._sync = training.mode == "sync"
        self._sync_policy = SyncPolicy(
            start_workers=serving.start_workers,
            min_workers=serving.min_workers,
            round_timeout_s=serving.round_timeout_s,
        )
        self._async_policy = AsyncPolicy(max_staleness=training.max_staleness)
        # pushes that are replays, or on another point than the present one
        self._unusual: set[str] = set()
        # who let a round's time pass; rounds do not wait for them until they push again
        self._passed_over: set[str] = set()
        # None: for live workers without a push
        self._waiting_for: tuple[str, ...] | None = ()
        self.refused: Counter[str] = Counter()
        # the optimizer raised: half a step may be done, so that nothing may be answered or saved
        self.failed = False

    def __contains__(self, worker: str) -> bool:
        return worker in self._pending

    @property
    def workers(self) -> frozenset[str]:
        """Whose pushes are undecided, whether they are still there or not."""
        return frozenset(self._pending)

    def get(self, worker: str) -> PendingPush | None:
        """Return the worker's undecided push, or None."""
        return self._pending.get(worker)

    def wake_all(self) -> None:
        """Have all who wait for a decision look again."""
        for pending in self._pending.values():
            pending.waiters.wake()

    def add(self, push: Push) -> PendingPush:
        """Take a push in that the ledger calls next; one that is there already is not doubled.

        Raises DigestDiffersError or InvalidError where another push waits under its number, and
        InvalidError for what only a worker that knows more than this server can send.
        """
        if self._recovery is None:
            _check_not_ahead(push, self._state.point.version)
        pending = PendingPush(worker=push.worker, push=push, arrived_s=self._clock())
        held = self._pending.setdefault(push.worker, pending)
        if held is not pending:
            _check_same(held.push, push)
            return held
        if self._is_unusual(push):
            self._unusual.add(push.worker)
        self._passed_over.discard(push.worker)
        if self.recovers and push.applied_version > self._state.point.version:
            self._leases.expect(push.members, self._clock())
        return pending

    def resolve(self, worker: str, outcome: Answer | RefusedError) -> None:
        """Decide the worker's push."""
        self._unusual.discard(worker)
        self._pending.pop(worker).resolve(outcome)

    def note_return(self, worker: str, version: int | None) -> None:
        """Note that `worker` is joining, and holds `version`, or nothing."""
        self._passed_over.discard(worker)
        if self._recovery is None:
            return
        if self._recovery.note_join(worker, version):
            # it has what it may replay on the way: a round's time begins anew
            self._returned_s = self._clock()
        self._recovery.look(self._state.point.version)

    @property
    def recovers(self) -> bool:
        """Whether the run is on its way back after a restart, and replays are believed."""
        return self._recovery is not None and not self._recovery.is_over

    def advance(self) -> None:
        """Make what versions can be made, and refuse what is stale."""
        while self._pending and not self.failed:
            if self._lacks_a_push():
                self._waiting_for = None
                break
            decision = self._decide()
            if isinstance(decision, Wait):
                self._waiting_for = decision.workers
                break
            if isinstance(decision, Apply):
                started_s = self._clock()
                if self._apply(sorted(decision.workers)):
                    self._passed_over.update(decision.passed_over)
                # while the lock was held nobody was heard
                self._leases.extend(self._clock() - started_s)
            else:
                for worker in decision.workers:
                    self.refused[decision.reason] += 1
                    # where it could not be in time, the version it has missed is counted
                    is_late = not self._sync and decision.reason == "stale"
                    self._counters.push_refused(worker, decision.reason, is_late=is_late)
                    self.resolve(worker, self._state.stale(self._pending[worker].push))

    @property
    def waiting_for(self) -> tuple[str, ...]:
        """The workers whose pushes are waited for, since `advance` last looked."""
        if self._waiting_for is None:
            return tuple(sorted(self._live() - self._pending.keys()))
        return self._waiting_for

    def _lacks_a_push(self) -> bool:
        """Return whether the rule of sync mode would wait for live workers without a push.

        It says so of most pushes, and to ask it costs several times more where workers are many.
        """
        now_s = self._clock()
        if not self._sync or self._unusual or now_s >= self._closing_s():
            return False
        there: Container[str] = self._pending
        if self._passed_over:
            there = self._pending.keys() | self._passed_over
        return self._leases.any_live_but(there, now_s)

    def _closing_s(self) -> float:
        """Return when the time ends of the round that the first of the pushes began."""
        first_s = next(iter(self._pending.values())).arrived_s
        return max(first_s, self._returned_s) + self._round_timeout_s

    def _live(self) -> frozenset[str]:
        """Return the workers that rounds wait for."""
        return self._leases.live(self._clock()) - self._passed_over

    def _is_unusual(self, push: Push) -> bool:
        return push.applied_version > 0 or push.base != self._state.point

    def next_event_s(self) -> float:
        """Return the seconds until a lease or a round's time ends; infinity where none runs."""
        now_s = self._clock()
        end_s = self._leases.next_end_s(now_s)
        closing_s = self._closing_s() if self._pending else now_s
        if closing_s > now_s:
            end_s = min(end_s, closing_s)
        return end_s - now_s

    def round_workers(self) -> int:
        """Return how many pushes a round of sync mode waits for, those that came included."""
        return self._sync_policy.size(self._view())

    def _view(self) -> RoundView:
        state, now_s = self._state, self._clock()
        recovery = self._recovery if self.recovers else None
        arrivals = [
            pending.arrived_s
            for pending in self._pending.values()
            if pending.push.base == state.point
        ]
        return RoundView(
            point=state.point,
            pending={worker: pending.push for worker, pending in self._pending.items()},
            live=self._live(),
            returning=frozenset() if recovery is None else self._leases.returning(now_s),
            joined=state.ledger.worker_count,
            on_chain=state.on_chain,
            waiting_since_s=max(min(arrivals), self._returned_s) if arrivals else None,
            now_s=now_s,
            # one may have been answered where the others were not
            believed_version=0 if recovery is None else recovery.reached_version + 1,
            held={} if recovery is None else recovery.held(),
            held_by=_nothing_held if recovery is None else recovery.held_by,
        )

    def _decide(self) -> Decision:
        view = self._view()
        if self._sync:
            return self._sync_policy.decide(view)
        recovery = self._recovery
        if recovery is not None and not recovery.has_ended:
            reached = recovery.reached_version
            if replays_of_next(view):  # one may have been answered where the others were not
                reached += 1
            if view.returning or view.point.version < reached:
                if recovery.is_late:
                    # who only renews the lease would hold up everybody for ever
                    view = replace(view, live=frozenset(), returning=frozenset())
                decision = self._async_policy.recover(view)
                if decision is not None:
                    return decision
            recovery.end()
        return self._async_policy.decide(view)

    def _apply(self, workers: Sequence[str]) -> bool:
        """Make the next version of these workers' pushes; False: it was undone, some refused."""
        pushes = [self._pending[worker].push for worker in workers]
        began_s = self._clock()
        try:
            with labelled("make a version"):
                self._state.apply(pushes)
        except NonFiniteStepError as error:
            for worker in error.workers:
                self._counters.push_refused(worker, "non_finite", is_late=False)
                self.resolve(worker, NonFiniteError(_would_overflow(self._pending[worker].push)))
            return False
        except Exception as error:
            # read without the lock by whoever ends the process, so never set for a moment only
            self.failed = True
            version = self._state.point.version + 1
            _log.exception("version %d could not be made: this server is of no use now", version)
            raise NotReadyError(FAILED) from error
        self._count_version(pushes, began_s)
        answers: dict[ModelVersion, Answer] = {}
        for push in pushes:
            if push.base not in answers:
                answers[push.base] = self._state.fresh(push)
            self.resolve(push.worker, answers[push.base])
        left = self._pending.items()
        self._unusual = {worker for worker, pending in left if self._is_unusual(pending.push)}
        if self._recovery is not None and self._sync:
            self._recovery.note_version(self._state.point.version, pushes)
        elif self._recovery is not None:
            self._recovery.note_replays(pushes)
        self._made()
        return True

    def _count_version(self, pushes: Sequence[Push], began_s: float) -> None:
        now_s = self._clock()
        waited_s = {
            push.worker: max(0.0, now_s - self._pending[push.worker].arrived_s) for push in pushes
        }
        missing: Sequence[str] = ()
        if self._sync and not any(push.applied_version for push in pushes):
            missing = [one for one in self._leases.joined(now_s) if one not in waited_s]
        self._counters.version_made(
            self._state.point.version,
            waited_s,
            missing,
            step_s=now_s - began_s,
            up_bytes=sum(push.frame_bytes for push in pushes),
        )


def _would_overflow(push: Push) -> str:
    return (
        f"push {push.sequence} of {push.worker!r}: with it the model or its optimizer's state "
        "would not be finite, so that nothing of it was applied: expected a smaller gradient, or a "
        "lower learning rate where training diverges; in float16 also a larger eps"
    )


def _nothing_held(worker: str) -> int:
    return 0


def _check_not_ahead(push: Push, version: int) -> None:
    if push.base.version > version:
        raise InvalidError(
            f"push {push.sequence} of {push.worker!r} is based on version {push.base.version}: "
            f"expected at most {version}, this server has lost nothing"
        )
    if push.applied_version:
        # it would choose its own company, and leave all others out of the version
        raise InvalidError(
            f"push {push.sequence} of {push.worker!r} says that it was applied in version "
            f"{push.applied_version}: expected none, this server has lost nothing"
        )


def _check_same(held: Push, push: Push) -> None:
    if held.digest != push.digest:
        raise DigestDiffersError(
            f"worker {push.worker!r} sent push {push.sequence} with other contents than those that "
            "wait under this number: expected the same bytes"
        )
    if (held.base, held.applied_version) != (push.base, push.applied_version):
        raise InvalidError(
            f"worker {push.worker!r} sent push {push.sequence} again with another base: expected "
            f"version {held.base.version}"
        )
