"""A worker's side of one parameter server: join, step with retry and replay, lease, leave.

The model here is what the worker holds at `point`. A push is made once and kept as bytes; whatever
breaks, those same bytes are sent again until the server has said what became of them.
"""

from __future__ import annotations

import logging
import secrets
import threading
from typing import Any

from topq_dist.compress.codec.frame import FrameError
from topq_dist.ps.client.call_errors import DoubtfulError, TransientError
from topq_dist.ps.client.connection import Connection
from topq_dist.ps.client.outcome import Outcome
from topq_dist.ps.client.replay_log import ReplayLog
from topq_dist.ps.client.retry_deadline import RetryDeadline
from topq_dist.ps.client.wait_notice import WaitNotice
from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.protocol.errors import (
    DamagedError,
    DigestDiffersError,
    ExpiredError,
    InvalidError,
    NonFiniteError,
    NotJoinedError,
    RefusedError,
    SequenceGapError,
    ServerLostError,
    TooLargeError,
    WrongRunError,
)
from topq_dist.ps.protocol.types import (
    INSTANCE_BYTES,
    START,
    Answer,
    GroupView,
    ModelVersion,
    NewPush,
    PushRecord,
    point_to_state,
)
from topq_dist.ps.security.policy import ClientSecurity
from topq_dist.ps.wire.codec import groups_from_wire, spec_to_wire
from topq_dist.ps.wire.messages import point_to_wire
from topq_dist.v1 import parameter_server_pb2 as pb

_log = logging.getLogger(__name__)
# what another Join, another try or some time may cure
_PASSING = (
    NotJoinedError,
    SequenceGapError,
    TransientError,
    DamagedError,
    FrameError,
    DoubtfulError,
)
_RENEWS_IN_A_LEASE = 3
# a step that begins meanwhile waits so long at most
_ASIDE_S = 2.0
_LONGEST_TEXT = 500


class ServerClient:
    """One worker's place at one server. Not for several threads at once.

    model: its values at `start`, and then what the worker holds. timeout_s: how long the server may
        be silent, and how long a transfer may take. Waiting for other workers is not silence.
    """

    def __init__(
        self,
        model: FlatModel,
        *,
        address: str,
        worker: str,
        timeout_s: float,
        security: ClientSecurity,
    ) -> None:
        self.address = address
        self.worker = worker
        self.model = model
        self.point = START
        self.pushes = ReplayLog()
        self.groups: tuple[GroupView, ...] = ()
        # whether the server knows of tensors without a gradient
        self.takes_no_gradient = False
        # whether somebody looks on there
        self.takes_report = False
        self._timeout_s = timeout_s
        self._notice = WaitNotice(address, worker)
        self._connection = Connection(address, security, waits_for=self._notice.heard)
        self._instance = secrets.token_bytes(INSTANCE_BYTES)
        self._id = pb.WorkerId(worker=worker)
        self._lease_s = timeout_s
        self._holds_model = False
        # whether the server knows us, and has all that it has applied of ours
        self._joined = False
        self._server_next = 1
        self._outcome = Outcome()
        self._warned = self._warned_of_disagreement = False
        # guards all of the above between steps and the thread that renews the lease
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._cancelled = threading.Event()
        self._renewer: threading.Thread | None = None

    @property
    def run(self) -> str:
        """The run that the server keeps."""
        return self._id.run

    def start(self) -> None:
        """Join the run, bring the model where the server has none, and take the server's values.

        Raises ServerLostError after `timeout_s`, and RefusedError.
        """
        self._notice.start()
        with self._lock, self._notice.waiting("joining"):
            self.resync()
        self._renewer = threading.Thread(
            target=self._keep_lease, name=f"lease at {self.address}", daemon=True
        )
        self._renewer.start()

    def begin(self, new: NewPush) -> None:
        """Make the next push, computed on what the worker holds; `finish` sends it."""
        with self._lock:
            self.pushes.begin(self.point, new)

    def finish(self) -> None:
        """Send the push under way until the server has decided on it, and take in what comes back.

        Without one under way nothing happens. Raises ServerLostError, after which it can be called
        again, and RefusedError; a push that the server will never take is given up then.
        """
        deadline = RetryDeadline(self._connection, self._timeout_s)
        with self._lock, self._notice.waiting(f"push {self.pushes.next_sequence}"):
            while self.pushes.pending is not None:
                try:
                    self._catch_up(deadline)
                    push = self.pushes.pending
                    if push is not None:
                        self._take_in(push, self._send_new(push, deadline))
                except _PASSING as error:
                    self._recover_from(deadline, error)
                except (DigestDiffersError, ExpiredError) as error:
                    self.resync_from(f"this time a push has become another one ({error})")

    def tell(self, report: pb.WorkerReport) -> None:
        """Have the next pushes bring this to who looks on there; nothing where nobody does."""
        self._connection.report = report if self.takes_report else None

    def cancel_calls(self) -> None:
        """Have what another thread does here raise TransientError soon, until `allow_calls`."""
        self._cancelled.set()
        self._connection.cancel_calls()

    def allow_calls(self) -> None:
        """Allow what `cancel_calls` forbade."""
        self._cancelled.clear()

    def collect(self) -> Outcome:
        """Return what happened since the last call."""
        with self._lock:
            outcome, self._outcome = self._outcome, Outcome()
            return outcome

    def fetch_central(self) -> FlatModel:
        """Return the server's own parameters; raises ServerLostError and RefusedError."""
        model = FlatModel(self.model.spec)
        deadline = RetryDeadline(self._connection, self._timeout_s)
        with self._lock, self._notice.waiting("fetching the model"):
            while True:
                try:
                    self._catch_up(deadline)
                    _, buffers = self._fetch(pb.FetchRequest.WHICH_CENTRAL, deadline)
                except _PASSING as error:
                    self._recover_from(deadline, error)
                else:
                    model.load_raw(buffers)
                    return model

    def state_dict(self) -> dict[str, Any]:
        """Return what a process needs, beside the model's values, to `resume` here."""
        with self._lock:
            return {
                "run": self.run,
                "point": point_to_state(self.point),
                "pushes": self.pushes.state_dict(),
            }

    def check_run(self, run: str) -> None:
        """Raise WrongRunError where the server keeps another run."""
        if run != self.run:
            raise WrongRunError(
                f"parameter server {self.address}: the state belongs to run {run!r} and this "
                f"server's is {self.run!r}"
            )

    def resume(self, point: ModelVersion, pushes: ReplayLog) -> None:
        """Go on from a saved state; `model` is to have the values that belong to `point`."""
        with self._lock:
            self.point, self.pushes = point, pushes
            self._joined = False

    def resync(self) -> None:
        """Take the server's present model and numbers, whatever was held before.

        Pushes that the server does not have are taken back. Raises ServerLostError and
        RefusedError.
        """
        at_first = not self._id.run
        deadline = RetryDeadline(self._connection, self._timeout_s, at_first=at_first)
        with self._lock:
            while True:
                try:
                    self._join_and_upload(deadline)
                    self._fetch_model(deadline)
                except _PASSING as error:
                    self._recover_from(deadline, error)
                else:
                    self._outcome.taken_back += self.pushes.take_back(self._server_next)
                    self._joined = True
                    return

    def resync_from(self, why: str) -> None:
        """Leave the path that a saved state would have taken, and `resync`."""
        with self._lock:
            sequence = self.pushes.next_sequence
            self.resync()
            self._outcome.forked |= sequence < self.pushes.next_sequence
            self._warn(
                f"{why}: going on from version {self.point.version}, where the server is, and "
                "without what was left of earlier gradients"
            )

    def close(self, timeout_s: float | None = None) -> None:
        """Give the place up, once all pushes are durable; raises ServerLostError, RefusedError.

        A push still under way is given up. timeout_s: None is the client's own. To close again
        does nothing.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        try:
            with self._lock:
                self.pushes.take_back(self.pushes.next_sequence)
                if self._holds_model:
                    self._leave(self._timeout_s if timeout_s is None else timeout_s)
        finally:
            self._connection.close()
            self._notice.close()
        if self._renewer is not None:
            self._renewer.join()

    # under the lock

    def _recover_from(self, deadline: RetryDeadline, error: Exception) -> None:
        """Get over an error that a new Join, another try or some time may cure."""
        _log.debug("parameter server %s: %s", self.address, error)
        self._notice.failed(error)
        if self._cancelled.is_set():
            raise TransientError("broken off") from error
        if isinstance(error, DamagedError | FrameError | DoubtfulError):
            # what was damaged of a header stays in HTTP/2's tables as long as the connection
            self._connection.cancel_calls()
            deadline.doubt(error)
            return
        if isinstance(error, TransientError):
            self._connection.refresh()
        else:
            self._joined = False
        deadline.pause(error)

    def _catch_up(self, deadline: RetryDeadline) -> None:
        """Join again where that is due, and replay what the server has lost."""
        if self._joined:
            return
        self._join_and_upload(deadline)
        lost = self.pushes.missing_at(self._server_next)
        if lost is None:
            self._fetch_model(deadline)
            self._take_back(self._server_next, "it lacks pushes that are not kept any more")
        elif all(self._replay(push, deadline) for push in lost):
            self._joined = True
            return
        self._joined = True

    def _join_and_upload(self, deadline: RetryDeadline) -> None:
        while self._join(deadline.left_s()):
            self._connection.upload(self._id, self.model.raw(), deadline.left_s())
            # once more: the server makes its groups with the model

    def _join(self, timeout_s: float) -> bool:
        """Join, and return whether the server wants the model; what it has lost is not replayed."""
        request = pb.JoinRequest(
            run=self.run,
            worker=self.worker,
            instance=self._instance,
            epoch=self._id.epoch,
            next_sequence=self.pushes.unsent_sequence if self._holds_model else 0,
            point=point_to_wire(self.point) if self._holds_model else None,
            first_kept=self.pushes.first_kept,
            model=spec_to_wire(self.model.spec),
        )
        self._joined = False
        joined = self._connection.join(request, timeout_s)
        self._id = joined.id
        self._server_next = joined.next_sequence
        self._lease_s = joined.lease_s
        if not self.groups:
            self.groups = groups_from_wire(joined.groups)
        self.takes_no_gradient = joined.takes_no_gradient
        self.takes_report = joined.takes_report
        self._notice.heard()
        self._forget_durable(joined.durable_version)
        return joined.upload

    def _fetch(
        self, which: pb.FetchRequest.Which.ValueType, deadline: RetryDeadline
    ) -> tuple[ModelVersion, tuple[memoryview, ...]]:
        point, durable_version, buffers = self._connection.fetch(
            self._id, which, self.model.spec, deadline.left_s()
        )
        self._forget_durable(durable_version)
        self._outcome.received_bytes += sum(buffer.nbytes for buffer in buffers)
        return point, buffers

    def _fetch_model(self, deadline: RetryDeadline) -> None:
        point, buffers = self._fetch(pb.FetchRequest.WHICH_WORKERS, deadline)
        self.model.load_raw(buffers)
        self._outcome.changed = None
        self.point = point
        self._holds_model = True

    def _forget_durable(self, version: int) -> None:
        before = self.pushes.next_sequence if self._joined else self._server_next
        self.pushes.forget_durable(version, before=before)

    def _send(self, push: PushRecord, deadline: RetryDeadline) -> Answer:
        answer = self._connection.step(
            self._id, push, self.model.spec, deadline.left_s(), deadline.extend
        )
        deadline.extend()
        self._outcome.sent_bytes += push.frame_bytes
        self._outcome.received_bytes += sum(update.payload_bytes for update in answer.updates)
        return answer

    def _send_new(self, push: PushRecord, deadline: RetryDeadline) -> Answer:
        """Send the push under way, and give it up where it is refused for what it holds."""
        try:
            return self._send(push, deadline)
        except (InvalidError, TooLargeError) as error:
            if not isinstance(error, DamagedError):
                given_up = self.pushes.take_back(push.sequence)
                if isinstance(error, NonFiniteError):
                    self._outcome.overflowed = True
                else:
                    self._outcome.taken_back += given_up
                    self._outcome.refused |= isinstance(error, InvalidError)
            raise

    def _take_in(self, push: PushRecord, answer: Answer) -> None:
        """Take in the answer to the push under way."""
        if answer.applied is not None and not answer.updates:
            raise DamagedError(
                f"parameter server {self.address}: push {push.sequence} applied without an update"
            )
        # after a damaged one, what came before it is there already
        held = self.point.version if self.point.version > push.base.version else 0
        for update in answer.updates:
            if update.point.version > held:
                self._outcome.apply(update, self.model, self.point.version, self.address)
                self.point = update.point
        if answer.disagreement and not self._warned_of_disagreement:
            self._warned_of_disagreement = True
            _log.warning(
                "worker %s at parameter server %s: the workers of a version do not agree: %s; give "
                "all the same schedule, and one that joins late the step that the run is at",
                self.worker,
                self.address,
                answer.disagreement[:_LONGEST_TEXT],
            )
        if answer.applied is None:
            self._take_back(push.sequence, "a push came too late for the version it belongs to")
        else:
            self.pushes.record_applied(push, answer.applied, answer.members)
        self._forget_durable(answer.durable_version)

    def _replay(self, push: PushRecord, deadline: RetryDeadline) -> bool:
        """Send an applied push again; return whether it is where it was, and the model with it."""
        try:
            answer = self._send(push, deadline)
        except InvalidError as error:
            if isinstance(error, DamagedError):
                raise
            self._fetch_model(deadline)
            self._take_back(
                self._server_next, f"the server takes a push no more that it had ({error})"
            )
            return False
        if answer.applied is not None:
            self._server_next = push.sequence + 1
        if answer.applied == push.applied:
            self._forget_durable(answer.durable_version)
            return True
        if answer.applied is not None:
            self.pushes.record_applied(push, answer.applied, answer.members)
        self._fetch_model(deadline)
        self._take_back(
            self._server_next, "the run has gone another way after the server's restart"
        )
        return False

    def _take_back(self, sequence: int, why: str) -> None:
        taken_back = self.pushes.take_back(sequence)
        self._outcome.taken_back += taken_back
        self._warn(
            f"{why}: {len(taken_back)} gradients go with later ones, from version "
            f"{self.point.version} on"
        )

    def _warn(self, what: str) -> None:
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        _log.log(level, "worker %s at parameter server %s: %s", self.worker, self.address, what)

    def _leave(self, timeout_s: float) -> None:
        deadline = RetryDeadline(self._connection, timeout_s)
        while True:
            try:
                self._catch_up(deadline)
                version = self._connection.leave(self._id, deadline.left_s())
                if version >= self.point.version:
                    return
                # killed since our last step, and back without it
                raise NotJoinedError(f"the server is back at version {version}")
            except _PASSING as error:
                self._recover_from(deadline, error)

    # the thread that keeps the lease

    def _keep_lease(self) -> None:
        while not self._closing.wait(self._lease_s / _RENEWS_IN_A_LEASE):
            try:
                self._renew(self._lease_s / _RENEWS_IN_A_LEASE)
            except (*_PASSING, RefusedError, ServerLostError, ValueError) as error:
                _log.debug("parameter server %s: lease not renewed: %s", self.address, error)

    def _renew(self, timeout_s: float) -> None:
        try:
            durable_version = self._connection.renew(self._id, timeout_s)
        except NotJoinedError:
            durable_version = None
        # a step that holds the lock does by itself what is to be done
        if not self._lock.acquire(blocking=False):
            return
        try:
            if durable_version is None:
                # others may wait for us to come back; the next step replays what is lost
                self._join(min(timeout_s, _ASIDE_S))
            else:
                self._forget_durable(durable_version)
        finally:
            self._lock.release()
