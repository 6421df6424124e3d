"""Pushes between their arrival and their version, and the way back after a restart.

Not for several threads at once: the coordinator's lock guards it.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig
from topq_dist.ps.protocol.errors import (
    DigestDiffersError,
    InvalidError,
    NotReadyError,
    RefusedError,
)
from topq_dist.ps.protocol.types import Answer, Push
from topq_dist.ps.server.membership import Leases
from topq_dist.ps.server.rounds import Apply, AsyncPolicy, Decision, RoundView, SyncPolicy, Wait
from topq_dist.ps.state.run_state import RunState

_log = logging.getLogger(__name__)
# who has joined replays with the next step, and that may take longer than a lease
_LEASES_TO_STEP = 10
FAILED = "the server failed while it made a version: it has to be started again"


@dataclass(eq=False, kw_only=True)
class PendingPush:
    """A push that was taken in: `outcome` is set once it is decided.

    look: set when those who wait for the push are to look at it again.
    """

    push: Push
    arrived_s: float
    look: threading.Event = field(default_factory=threading.Event)
    outcome: Answer | RefusedError | None = None

    def resolve(self, outcome: Answer | RefusedError) -> None:
        """Set the outcome, and free the gradient."""
        self.outcome = outcome
        self.push = replace(self.push, frames=())
        self.look.set()


class PushQueue:
    """The undecided pushes of a run, at most one of each worker.

    recover_to: the version up to which a restarted server waits for replays before it takes what
    is new; None where nothing is lost. clock: seconds. made: called after each new version.
    """

    def __init__(
        self,
        training: TrainingConfig,
        serving: ServingConfig,
        state: RunState,
        leases: Leases,
        *,
        recover_to: int | None,
        clock: Callable[[], float],
        made: Callable[[], None],
    ) -> None:
        self._state = state
        self._leases = leases
        self._clock = clock
        self._made = made
        self._recover_to = recover_to if training.mode == "async" else None
        self._has_lost_nothing = recover_to is None
        self._round_timeout_s = serving.round_timeout_s
        self._returned_s = -math.inf
        # when the way back last went on, and how long at most until it does again
        self._moved_s = clock()
        self._recovery_limit_s = _LEASES_TO_STEP * serving.lease_s
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
        # None: for live workers without a push
        self._waiting_for: tuple[str, ...] | None = ()
        self.stale_count = 0
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
            pending.look.set()

    def add(self, push: Push) -> PendingPush:
        """Take a push in that the ledger calls next; one that is there already is not doubled.

        Raises DigestDiffersError or InvalidError where another push waits under its number, and
        InvalidError for what only a worker that knows more than this server can send.
        """
        if self._has_lost_nothing:
            _check_not_ahead(push, self._state.point.version)
        pending = PendingPush(push=push, arrived_s=self._clock())
        held = self._pending.setdefault(push.worker, pending)
        if held is not pending:
            _check_same(held.push, push)
            return held
        if self._is_unusual(push):
            self._unusual.add(push.worker)
        self._leases.expect(push.members, self._clock())
        return pending

    def resolve(self, worker: str, outcome: Answer | RefusedError) -> None:
        """Decide the worker's push."""
        self._unusual.discard(worker)
        self._pending.pop(worker).resolve(outcome)

    def note_return(self, worker: str, version: int) -> None:
        """Note that `worker` is joining, and holds `version`."""
        member = self._leases.get(worker)
        if member is not None and not member.has_joined:
            # it has what it may replay on the way: a round's time begins anew
            self._returned_s = self._moved_s = self._clock()
        if self._recover_to is not None:
            self._recover_to = max(self._recover_to, version)

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
                self._apply(sorted(decision.workers))
            else:
                for worker in decision.workers:
                    self.stale_count += 1
                    self.resolve(worker, self._state.stale(self._pending[worker].push))

    @property
    def waiting_for(self) -> tuple[str, ...]:
        """The workers whose pushes are waited for, since `advance` last looked."""
        if self._waiting_for is None:
            return tuple(sorted(self._leases.live(self._clock()) - self._pending.keys()))
        return self._waiting_for

    def _lacks_a_push(self) -> bool:
        """Return whether the rule of sync mode would wait for live workers without a push.

        It says so of most pushes, and to ask it costs several times more where workers are many.
        """
        if not self._sync or self._unusual or self._round_timeout_s is not None:
            return False
        return self._leases.any_live_but(self._pending, self._clock())

    def _is_unusual(self, push: Push) -> bool:
        return push.applied_version > 0 or push.base != self._state.point

    def next_event_s(self) -> float:
        """Return the seconds until a lease or a round's time ends; infinity where none runs."""
        now_s = self._clock()
        end_s = self._leases.next_end_s(now_s)
        if self._round_timeout_s is not None and self._pending:
            first_s = min(pending.arrived_s for pending in self._pending.values())
            closing_s = max(first_s, self._returned_s) + self._round_timeout_s
            if closing_s > now_s:
                end_s = min(end_s, closing_s)
        return end_s - now_s

    def round_workers(self) -> int:
        """Return how many pushes a round of sync mode waits for, those that came included."""
        return self._sync_policy.size(self._view())

    def _view(self) -> RoundView:
        state, now_s = self._state, self._clock()
        arrivals = [
            pending.arrived_s
            for pending in self._pending.values()
            if pending.push.base == state.point
        ]
        return RoundView(
            point=state.point,
            pending={worker: pending.push for worker, pending in self._pending.items()},
            live=self._leases.live(now_s),
            returning=self._leases.returning(now_s),
            joined=state.ledger.worker_count,
            on_chain=state.on_chain,
            waiting_since_s=max(min(arrivals), self._returned_s) if arrivals else None,
            now_s=now_s,
        )

    def _decide(self) -> Decision:
        view = self._view()
        if self._sync:
            return self._sync_policy.decide(view)
        if self._recover_to is not None:
            if view.returning or view.point.version < self._recover_to:
                if view.now_s >= self._moved_s + self._recovery_limit_s:
                    # who only renews the lease would hold up everybody for ever
                    view = replace(view, live=frozenset(), returning=frozenset())
                decision = self._async_policy.recover(view)
                if decision is not None:
                    return decision
            self._recover_to = None
        return self._async_policy.decide(view)

    def _apply(self, workers: Sequence[str]) -> None:
        started_s = self._clock()
        pushes = [self._pending[worker].push for worker in workers]
        try:
            self._state.apply(pushes)
        except Exception as error:
            # read without the lock by whoever ends the process, so never set for a moment only
            self.failed = True
            version = self._state.point.version + 1
            _log.exception("version %d could not be made: this server is of no use now", version)
            raise NotReadyError(FAILED) from error
        for push in pushes:
            self.resolve(push.worker, self._state.fresh(push))
        left = self._pending.items()
        self._unusual = {worker for worker, pending in left if self._is_unusual(pending.push)}
        self._moved_s = self._clock()
        # while the lock was held nobody was heard
        self._leases.extend(self._clock() - started_s)
        self._made()


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
