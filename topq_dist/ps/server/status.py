"""The server's own totals, and its run as `topq status` shows it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from topq_dist.ps.protocol.types import START, Answer, ModelVersion
from topq_dist.ps.server.leases import Leases, Member
from topq_dist.ps.server.push_queue import PushQueue
from topq_dist.ps.state.ledger import Ledger
from topq_dist.ps.state.run_state import RunState

_PAUSE_PER_HASH = 4.0
_LOOK_S = 0.5


@dataclass(frozen=True, kw_only=True)
class WorkerView:
    """A worker as status shows it; the fields are those of WorkerStatus."""

    worker: str
    epoch: int
    sequence: int
    version: int
    lag: int
    lease_left_s: float
    waiting: bool
    received_bytes: int
    sent_bytes: int


@dataclass(frozen=True, kw_only=True)
class Status:
    """The run as status shows it; the fields are those of StatusResponse."""

    run: str
    point: ModelVersion
    durable_version: int
    numel: int
    workers: tuple[WorkerView, ...]
    refused: dict[str, int]
    received_bytes: int
    sent_bytes: int
    uptime_s: float
    state_sha256: str
    round_workers: int


class Totals:
    """Counts what a server moves and refuses; never waits for a version in the making."""

    def __init__(self, leases: Leases, clock: Callable[[], float]) -> None:
        self._leases = leases
        self._clock = clock
        self._started_s = clock()
        self._lock = threading.Lock()
        self._refused: Counter[str] = Counter()
        self._received_bytes = 0
        self._sent_bytes = 0
        # what that would be, sent whole
        self.received_dense_bytes = 0
        self.sent_dense_bytes = 0
        self.decode_s = 0.0

    def refuse(self, reason: str) -> None:
        """Count a refused call."""
        with self._lock:
            self._refused[reason] += 1

    def receive(self, worker: str, received_bytes: int, dense_bytes: int = 0) -> None:
        """Count bytes of a push's frames, and of the same gradient sent whole."""
        with self._lock:
            self._received_bytes += received_bytes
            self.received_dense_bytes += dense_bytes
            member = self._leases.get(worker)
            if member is not None:
                member.received_bytes += received_bytes

    def decoded(self, seconds: float) -> None:
        """Count the time that decoding a push has taken."""
        with self._lock:
            self.decode_s += seconds

    def send(self, worker: str, answer: Answer, dense_bytes: int = 0) -> None:
        """Count an answer, whose updates the worker holds from now on, and one sent whole."""
        with self._lock:
            self._sent_bytes += answer.payload_bytes
            self.sent_dense_bytes += dense_bytes if answer.updates else 0
            member = self._leases.get(worker)
            if member is not None:
                member.sent_bytes += answer.payload_bytes
                if answer.updates:
                    member.held_version = answer.updates[-1].point.version

    def status(
        self,
        run: str,
        ledger: Ledger,
        state: RunState | None,
        pushes: PushQueue | None,
        *,
        durable_version: int,
        round_workers: int,
        state_sha256: str,
    ) -> Status:
        """Return how the run is doing; under the coordinator's lock."""
        now_s = self._clock()
        point = START if state is None else state.point
        known = frozenset(ledger.workers)
        waiting = frozenset() if pushes is None else pushes.workers
        with self._lock:
            refused = dict(self._refused)
        if pushes is not None:
            refused |= pushes.refused
        return Status(
            run=run,
            point=point,
            durable_version=durable_version,
            numel=0 if state is None else state.spec.numel,
            workers=tuple(
                _view(member, ledger, point, now_s, waiting=member.worker in waiting)
                for member in self._leases.all()
                if member.worker in known
            ),
            refused=refused,
            received_bytes=self._received_bytes,
            sent_bytes=self._sent_bytes,
            uptime_s=now_s - self._started_s,
            state_sha256=state_sha256,
            round_workers=round_workers,
        )


def _view(
    member: Member, ledger: Ledger, point: ModelVersion, now_s: float, *, waiting: bool
) -> WorkerView:
    return WorkerView(
        worker=member.worker,
        epoch=ledger.entry(member.worker).epoch,
        sequence=ledger.next_sequence(member.worker) - 1,
        version=member.held_version,
        lag=max(0, point.version - member.held_version),
        lease_left_s=max(0.0, member.lease_end_s - now_s),
        waiting=waiting,
        received_bytes=member.received_bytes,
        sent_bytes=member.sent_bytes,
    )


class HashTurns:
    """Turns at hashing the whole state: everybody waits meanwhile, so that they get a part of the
    time at most.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next_s = 0.0

    @contextmanager
    def turn(self, check: Callable[[], None]) -> Iterator[None]:
        """Wait for a turn, and have it while the block runs.

        check: raises where there is nothing to wait for any more; called now and then.
        """
        while not self._lock.acquire(timeout=_LOOK_S):
            check()
        try:
            while (left_s := self._next_s - time.monotonic()) > 0:
                check()
                time.sleep(min(left_s, _LOOK_S))
            check()
            started_s = time.monotonic()
            yield
            ended_s = time.monotonic()
            self._next_s = ended_s + _PAUSE_PER_HASH * (ended_s - started_s)
        finally:
            self._lock.release()
