"""The coordinator: takes pushes from many threads and turns them into versions, one at a time.

One lock guards everything. The thread whose push completes a version makes it; the others wait
and, when a lease or a time runs out, look again. Nothing depends on a thread staying: a push whose
sender is gone stays pending, and whoever comes next decides on it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.errors import (
    FencedError,
    NotJoinedError,
    NotReadyError,
    RefusedError,
)
from topq_dist.ps.protocol.types import (
    START,
    Answer,
    ModelVersion,
    Push,
    Update,
    check_worker_name,
)
from topq_dist.ps.server.membership import NO_MODEL
from topq_dist.ps.server.push_queue import PendingPush
from topq_dist.ps.server.requests import JoinCall, Joined, PushPermit, WorkerId
from topq_dist.ps.server.run import DRAINING, Run
from topq_dist.ps.server.status import Status
from topq_dist.ps.state.ledger import Repeat
from topq_dist.ps.state.run_state import RunState


class Coordinator(Run):
    """Answers what workers ask of one run, for callers in any number of threads."""

    # joining

    def join(self, call: JoinCall, *, wait_s: float = 5.0) -> Joined:
        """Give the worker a place in the run, or renew it.

        Waits at most `wait_s` while another worker brings the model. Raises RefusedError.
        """
        check_worker_name(call.worker)
        with self._changed:
            self._check_serving()
            self._make_room()
            entry = self._membership.enter(call, has_model=self._state is not None)
            held = call.held or START
            if self._pushes is not None:
                self._pushes.note_return(call.worker, None if call.held is None else held.version)
                pending = self._pushes.get(call.worker)
                if pending is not None and pending.push.epoch != entry.epoch:
                    # not applied: the new process sends it again where it goes on from there
                    self._pushes.resolve(call.worker, FencedError(_fenced(pending.push)))
            self._leases.join(call.worker, held_version=held.version, now_s=self._clock())
            upload = self._model_or_upload(call, wait_s)
            self._advance()
            state = self._state
            return Joined(
                caller=WorkerId(run=self.run, worker=call.worker, epoch=entry.epoch),
                next_sequence=self._ledger.next_sequence(call.worker),
                point=START if state is None else state.point,
                durable_version=self._snapshotter.acknowledged_version,
                upload=upload,
                groups=() if state is None else state.central.groups(),
            )

    def _model_or_upload(self, call: JoinCall, wait_s: float) -> bool:
        end_s = time.monotonic() + wait_s
        # a model that is not durable yet may have been another one after a restart
        while self._snapshotter.version < 0:
            self._check_serving()
            if self._state is None and self._membership.is_to_upload(call):
                return True
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                raise NotReadyError("another worker is still bringing the model: join again")
            self._changed.wait(min(left_s, 1.0))
            self._leases.touch(call.worker, self._clock())
        return False

    def upload_spec(self, caller: WorkerId) -> ModelSpec | None:
        """Return what `caller` is to upload, or None where the model is there already."""
        with self._changed:
            self._check_serving()
            self._membership.check_caller(caller)
            if self._state is not None:
                return None
            self._membership.check_uploader(caller.worker)
            return self._membership.spec

    def upload(self, caller: WorkerId, vectors: Sequence[memoryview]) -> None:
        """Start the run with these raw vectors; once the model is there, nothing happens.

        Returns when the initial model is durable. Raises RefusedError.
        """
        spec = self.upload_spec(caller)
        if spec is not None:
            # built outside the lock: the model may be large, and leases are renewed meanwhile
            state = RunState.start(
                self.run,
                self.training,
                spec,
                vectors,
                ledger=self._ledger,
                history_bytes=self.serving.history_bytes,
            )
            with self._changed:
                if self._state is None and self._membership.spec == spec:
                    self._begin(state, None)
                    self._snapshotter.request()
                    self._changed.notify_all()
        with self._changed:
            self._snapshotter.wait(0)

    # pushes

    def permit(self, caller: WorkerId, sequence: int, digest: bytes) -> PushPermit:
        """Return what `submit` takes a push on, once its frames are there.

        Raises RefusedError for a push that is refused for its sender or its number.
        """
        with self._lock:
            self._check_serving()
            has_model = self._state is not None and self._snapshotter.version >= 0
            return self._membership.admit(caller, sequence, digest, has_model=has_model)

    def submit(self, permit: PushPermit, push: Push) -> PendingPush:
        """Take in the push of a permit; `wait` says what became of it. Raises RefusedError."""
        with self._lock:
            self._check_serving()
            permit = self._membership.renew(permit)
            state = self._started()
            # the limit may have been another one when a push was applied
            returns = self._pushes is not None and self._pushes.recovers
            was_applied = returns and push.applied_version > 0
            was_applied = was_applied or isinstance(permit.verdict, Repeat)
            state.central.check_push(push, max_lr=math.inf if was_applied else self.serving.max_lr)
            if isinstance(permit.verdict, Repeat):
                pending = PendingPush(worker=push.worker, push=push, arrived_s=self._clock())
                pending.resolve(state.repeat(push, permit.verdict.version))
                self.counters.pushes["repeated"] += 1
                return pending
            if self._pushes is None:
                raise NotReadyError(NO_MODEL)
            pending = self._pushes.add(push)
            self._advance()
            return pending

    def wait(
        self,
        pending: PendingPush,
        timeout_s: float,
        *,
        is_active: Callable[[], bool] = lambda: True,
    ) -> Answer | tuple[str, ...]:
        """Return the push's answer, or whom it waits for after `timeout_s` without one.

        To call it says that the sender is there, which keeps its lease; once `is_active` says that
        it is not, it returns early. Raises RefusedError.
        """
        end_s = time.monotonic() + timeout_s
        self.hear(pending.worker)
        turn = pending.waiters.add()
        try:
            while pending.outcome is None:
                with self._lock:
                    turn.acquire(blocking=False)
                    self._check_alive()
                    self._advance()
                    if pending.outcome is not None:
                        break
                    if self._draining:
                        raise NotReadyError(DRAINING)
                    left_s = end_s - time.monotonic()
                    pushes = self._pushes
                    if left_s <= 0 or pushes is None or not is_active():
                        return () if pushes is None else pushes.waiting_for
                    left_s = max(0.0, min(left_s, pushes.next_event_s()))
                # without the lock: a round wakes all its workers at once
                turn.acquire(timeout=min(left_s, threading.TIMEOUT_MAX))
        finally:
            pending.waiters.drop(turn)
        if isinstance(pending.outcome, RefusedError):
            raise pending.outcome
        if not self._may_answer(pending.outcome, end_s, is_active):
            return ()
        durable_version = self._snapshotter.acknowledged_version
        if pending.outcome.durable_version == durable_version:
            return pending.outcome
        return replace(pending.outcome, durable_version=durable_version)

    def note_sent(self, worker: str, answer: Answer) -> None:
        """Count an answer that goes out; takes no lock."""
        state = self._state
        self.totals.send(worker, answer, 0 if state is None else state.spec.raw_bytes)

    def wake(self, pending: PendingPush) -> None:
        """Have those who wait for this push look at whether they are active; never blocks."""
        pending.waiters.wake()

    # everything else that workers ask for

    def hear(self, worker: str) -> None:
        """Renew the lease of a worker whose bytes come in; takes no lock."""
        self._leases.touch(worker, self._clock())

    def renew_leases(self) -> None:
        """Begin all leases that run anew, after a long pause of this process; takes no lock."""
        self._leases.renew_live(self._clock())

    def fetch(self, caller: WorkerId, *, central: bool) -> tuple[Update, int]:
        """Return the whole model, as workers hold it or `central`'s own, and the durable version.

        Raises RefusedError.
        """
        with self._changed:
            self._check_serving()
            self._membership.check_caller(caller)
            state = self._started()
            point = state.point
            with self._unheard():
                full = state.full(central=central)
            if self.serving.snapshot_every == 1:
                self._snapshotter.wait(point.version)
            member = self._leases.get(caller.worker)
            if member is not None and not central:
                member.held_version = point.version
            return full, self._snapshotter.acknowledged_version

    def renew(self, caller: WorkerId) -> int:
        """Renew the lease and return the durable version; raises RefusedError."""
        with self._changed:
            self._membership.check_caller(caller)
            return self._snapshotter.acknowledged_version

    def leave(self, caller: WorkerId) -> ModelVersion:
        """Give the worker's place up and return the present point, once that is durable."""
        with self._changed:
            self._membership.leave(caller)
            if self._pushes is not None and caller.worker in self._pushes:
                left = NotJoinedError(f"worker {caller.worker!r} has left the run")
                self._pushes.resolve(caller.worker, left)
            self._advance()
            # somebody else may be the one to bring the model now
            self._changed.notify_all()
            if self._state is None:
                return START
            point = self._state.point
            if self._snapshotter.version < point.version:
                self._snapshotter.request()
                self._snapshotter.wait(point.version)
            return point

    def status(
        self, *, state_sha256: bool = False, is_active: Callable[[], bool] = lambda: True
    ) -> Status:
        """Return how the run is doing; with `state_sha256` the whole state is read.

        That is done for one caller after the other. Raises NotReadyError for one that `is_active`
        says is gone, and where the server is shutting down.
        """
        if not state_sha256:
            return self._status(state_sha256=False)

        def check() -> None:
            if self._draining:
                raise NotReadyError(DRAINING)
            if not is_active():
                raise NotReadyError("the caller has gone before it had its turn at a hash")

        with self._hash_turns.turn(check):
            return self._status(state_sha256=True)

    def _status(self, *, state_sha256: bool) -> Status:
        with self._changed:
            hashed = ""
            if self._state is not None and state_sha256:
                with self._unheard():
                    hashed = self._state.sha256()
            return self.totals.status(
                self.run,
                self._ledger,
                self._state,
                self._pushes,
                durable_version=self._snapshotter.acknowledged_version,
                round_workers=self._round_workers(),
                state_sha256=hashed,
            )

    # under the lock

    def _make_room(self) -> None:
        present = {member.worker for member in self._leases.all()}
        if self._pushes is not None:
            present.update(self._pushes.workers)
        self._ledger.make_room(present)
        self.counters.keep_only(present)

    def _may_answer(self, answer: Answer, end_s: float, is_active: Callable[[], bool]) -> bool:
        """Wait until `answer` may be given, and return whether it may."""
        self._check_alive()
        if self.serving.snapshot_every > 1:
            return True
        version = max((update.point.version for update in answer.updates), default=0)
        with self._lock:
            return self._snapshotter.reached(version, end_s, is_active)


def _fenced(push: Push) -> str:
    return (
        f"worker {push.worker!r} in epoch {push.epoch}: a newer process has taken this name while "
        f"push {push.sequence} was waiting"
    )
