"""A run on one state directory: begun or restored, guarded by one lock, drained at its end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig, check_together
from topq_dist.ps.protocol.errors import NotReadyError
from topq_dist.ps.server.leases import Leases, Phase
from topq_dist.ps.server.membership import NO_MODEL, Membership
from topq_dist.ps.server.push_queue import FAILED, PushQueue
from topq_dist.ps.server.recovery import Recovery
from topq_dist.ps.server.run_counters import RunCounters
from topq_dist.ps.server.status import HashTurns, Totals
from topq_dist.ps.state.ledger import Ledger
from topq_dist.ps.state.run_state import RunState, new_run
from topq_dist.ps.state.snapshot import Snapshot
from topq_dist.ps.state.snapshotter import Snapshotter
from topq_dist.ps.state.state_dir import StateDir
from topq_dist.ps.training.downlink import check_downlink
from topq_dist.ps.training.inner_optimizer import check_inner_optimizer
from topq_dist.ps.training.inner_step import check_adapt_rate, describe_momentum

_log = logging.getLogger(__name__)
DRAINING = "the server is shutting down: try again later"


class Run:
    """The parts of one run, and whether they may be used now.

    clock: seconds, from anywhere on; leases and time-outs go by it. One lock guards everything.

    Raises ValueError for a configuration that no optimizer takes, or a snapshot of another one.
    """

    def __init__(
        self,
        training: TrainingConfig,
        serving: ServingConfig,
        state_dir: StateDir,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_together(training, serving)
        self.serving = serving
        self._clock = clock
        self._lock = threading.RLock()
        # who waits for a push to be decided waits for its event, and all others for this
        self._changed = threading.Condition(self._lock)
        self._leases = Leases(lease_s=serving.lease_s, max_workers=serving.max_workers)
        self.totals = Totals(self._leases, clock)
        looked_at = serving.metrics is not None or serving.http is not None
        self.counters = RunCounters(observed=looked_at)
        self._hash_turns = HashTurns()
        self._draining = False
        # whether the last snapshot was written, or could not be
        self._drained = False
        self._state: RunState | None = None
        self._pushes: PushQueue | None = None
        self._snapshotter = Snapshotter(
            state_dir,
            self._changed,
            every=serving.snapshot_every,
            snapshot=self._snapshot,
            check_alive=self._check_saving,
        )
        loaded = RunState.load(state_dir, training, history_bytes=serving.history_bytes)
        self.training = training.begun() if loaded is None else loaded[0].training
        if loaded is None:
            check_inner_optimizer(training)
            check_downlink(training)
            run, ledger, spec = new_run(), Ledger(), None
        else:
            state, workers = loaded
            run, ledger, spec = state.run, state.ledger, state.spec
            self._leases.add(workers, Phase.RETURNING, clock())
            recovery = Recovery(
                version=state.point.version,
                leases=self._leases,
                lease_s=serving.lease_s,
                clock=clock,
            )
            self._begin(state, recovery)
        check_adapt_rate(training)
        self.momentum_text, warned = describe_momentum(self.training)
        self.run = run
        self._ledger = ledger
        self._membership = Membership(
            serving, run=run, ledger=ledger, leases=self._leases, spec=spec, clock=clock
        )
        level = logging.INFO
        if warned and training.momentum != "optimizer":  # who asked for that knows it
            level = logging.WARNING
        _log.log(level, "momentum: %s", self.momentum_text)
        if loaded is not None:
            self._snapshotter.go_on_from(loaded[0].point.version)
        self._snapshotter.start()

    def _begin(self, state: RunState, recovery: Recovery | None) -> None:
        self._state = state
        self._pushes = PushQueue(
            self.training,
            self.serving,
            state,
            self._leases,
            recovery=recovery,
            clock=self._clock,
            made=lambda: self._snapshotter.made(state.point.version),
            counters=self.counters,
        )

    @property
    def failed(self) -> bool:
        """Whether a version could not be made, or another server has taken over.

        Nothing is answered or saved after that.
        """
        return self._snapshotter.lost or (self._pushes is not None and self._pushes.failed)

    def drain(self) -> None:
        """Take in nothing more, send those who wait away, and make what there is durable."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            if self._pushes is not None:
                self._pushes.wake_all()
        self._snapshotter.close()
        with self._changed:
            unsaved = (
                self._state is not None and self._snapshotter.version < self._state.point.version
            )
            try:
                if unsaved and not self.failed:
                    self._snapshotter.save()
            finally:
                self._drained = True
                self._changed.notify_all()

    def counted(self) -> tuple[RunCounters, Snapshotter]:
        """Return what counts the run and its snapshots; to be read under `locked`."""
        return self.counters, self._snapshotter

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the run: it stands still meanwhile."""
        with self._lock:
            yield

    # under the lock

    def _check_serving(self) -> None:
        self._check_alive()
        if self._draining:
            raise NotReadyError(DRAINING)

    def _check_alive(self) -> None:
        if self.failed:
            raise NotReadyError(FAILED)

    def _check_saving(self) -> None:
        self._check_alive()
        if self._drained:
            raise NotReadyError(DRAINING)

    def _started(self) -> RunState:
        if self._state is None or self._snapshotter.version < 0:
            raise NotReadyError(NO_MODEL)
        return self._state

    def _advance(self) -> None:
        if self._pushes is None or self._state is None or self._draining:
            return
        if not self._snapshotter.holds_up(self._state.point.version):
            self._pushes.advance()

    @contextmanager
    def _unheard(self) -> Iterator[None]:
        """Lengthen all leases by the time that the block takes: meanwhile nobody is heard."""
        started_s = self._clock()
        try:
            yield
        finally:
            self._leases.extend(self._clock() - started_s)

    def _round_workers(self) -> int:
        """Return how many pushes the next version is to be made of; 0 in async mode."""
        if self.training.mode != "sync":
            return 0
        if self._pushes is None:
            return max(self.serving.start_workers, self.serving.min_workers)
        return self._pushes.round_workers()

    def _snapshot(self) -> Snapshot | None:
        if self._state is None or self._pushes is None or self.failed:
            return None
        # not those of whom others speak: a restart would take them for workers that it knows
        live = self._leases.live(self._clock()) - self._leases.only_expected()
        with self._unheard():
            if not self._state.central.is_finite():
                _log.critical(
                    "version %d holds NaN or infinity and is not saved: this server ends, and one "
                    "that is started again goes on from the snapshot before",
                    self._state.point.version,
                )
                self._pushes.failed = True
                return None
            return self._state.snapshot(live, every=self.serving.snapshot_every)
