"""Each push is applied exactly once, whatever is repeated, reordered, fenced or restored.

Workers and a server as in a run, over a network that repeats and reorders. The reference keeps
everything that was ever applied in a plain list.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from ps.ledger_calls import check, digest, push, reloaded

from topq_dist.ps.protocol.errors import (
    DigestDiffersError,
    ExpiredError,
    FencedError,
    NotJoinedError,
    RefusedError,
    SequenceGapError,
)
from topq_dist.ps.protocol.types import START, Push
from topq_dist.ps.state.ledger import Ledger, Next, Repeat


@dataclass
class Applied:
    version: int
    worker: str
    sequence: int
    digest: bytes


@dataclass
class Process:
    """A worker's process: it keeps every push, so that it can replay whatever a server lost."""

    worker: str
    instance: bytes
    epoch: int = 0
    made: dict[int, bytes] = field(default_factory=dict)


@dataclass
class Server:
    """The state a server restores together: the ledger, and the effect of all pushes it applied."""

    ledger: Ledger
    applied: list[Applied]
    fences: dict[str, tuple[bytes, int]]
    forgotten_before: int = 0

    def copy(self) -> Server:
        return Server(
            reloaded(self.ledger), list(self.applied), dict(self.fences), self.forgotten_before
        )

    def of(self, worker: str) -> dict[int, Applied]:
        return {one.sequence: one for one in self.applied if one.worker == worker}


def expected_verdict(server: Server, sent: Push) -> Next | Repeat | type[RefusedError]:
    """The answer of the ledger, found by looking through everything that was ever applied."""
    fence = server.fences.get(sent.worker)
    if fence is None or sent.epoch > fence[1]:
        return NotJoinedError
    if sent.epoch < fence[1]:
        return FencedError
    applied = server.of(sent.worker)
    if sent.sequence not in applied:
        return Next() if sent.sequence == max(applied, default=0) + 1 else SequenceGapError
    before = applied[sent.sequence]
    if before.version < server.forgotten_before:
        return ExpiredError
    if before.digest != sent.digest:
        return DigestDiffersError
    return Repeat(before.version)


WORKERS = st.sampled_from(["a", "b", "c"])
ANY = st.integers(0, 10**6)


class ExactlyOnce(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.server = Server(Ledger(), [], {})
        self.snapshots = [self.server.copy()]
        self.processes: list[Process] = []
        self.newest: dict[str, Process] = {}
        self.network: list[Push] = []

    @rule(worker=WORKERS)
    def start_process(self, worker: str) -> None:
        # a new process resumes from its forerunner's checkpoint, which holds its pushes
        old = self.newest.get(worker)
        process = Process(worker, len(self.processes).to_bytes(16, "little"))
        process.made = dict(old.made) if old else {}
        self.processes.append(process)
        self.newest[worker] = process
        self.join(process)

    @rule(which=ANY, forget_epoch=st.booleans())
    def join_again(self, which: int, forget_epoch: bool) -> None:
        if self.processes:
            process = self.processes[which % len(self.processes)]
            if forget_epoch and process is self.newest[process.worker]:
                process.epoch = 0
            self.join(process)

    def join(self, process: Process) -> None:
        ledger, worker = self.server.ledger, process.worker
        fence = self.server.fences.get(worker)
        before = ledger.to_json()
        # what it made is numbered from 1, and it keeps all of it
        claim = 1 if process.made else 0
        try:
            entry = ledger.join(worker, process.instance, process.epoch, claim)
        except FencedError:
            assert ledger.to_json() == before
            assert fence is not None
            assert fence[0] != process.instance
            assert 0 < process.epoch <= fence[1]
            return
        if fence is None:
            assert entry.epoch == max(process.epoch, 1)
        elif process.epoch > fence[1]:
            assert entry.epoch == process.epoch
        elif fence[0] == process.instance:
            assert entry.epoch == fence[1]
        else:
            assert process.epoch == 0
            assert entry.epoch == fence[1] + 1
        assert entry.next_sequence == max(self.server.of(worker), default=0) + 1
        self.server.fences[worker] = (process.instance, entry.epoch)
        process.epoch = entry.epoch

    @rule(which=ANY, twin=st.booleans())
    def make_and_send(self, which: int, twin: bool) -> None:
        if not self.processes:
            return
        process = self.processes[which % len(self.processes)]
        sequence = len(process.made) + 1
        # processes of one name may compute other gradients under one number
        contents = f"{process.worker} {sequence} {process.instance.hex() if twin else ''}"
        process.made[sequence] = digest(contents)
        self.send(process, sequence)

    @rule(which=ANY, number=ANY)
    def send_again(self, which: int, number: int) -> None:
        if self.processes:
            process = self.processes[which % len(self.processes)]
            if process.made:
                self.send(process, number % len(process.made) + 1)

    def send(self, process: Process, sequence: int) -> None:
        self.network.append(
            Push(
                worker=process.worker,
                epoch=process.epoch,
                sequence=sequence,
                base=START,
                frames=(),
                lr=(),
                digest=process.made[sequence],
            )
        )

    @rule(picks=st.lists(ANY, min_size=1, max_size=4), repeat=st.booleans())
    def deliver(self, picks: list[int], repeat: bool) -> None:
        round_: dict[str, Push] = {}
        for pick in picks:
            if not self.network:
                break
            sent = self.network[pick % len(self.network)]
            if not repeat:
                self.network.remove(sent)
            before = self.server.ledger.to_json()
            verdict: Next | Repeat | type[RefusedError]
            try:
                verdict = check(self.server.ledger, sent)
            except RefusedError as error:
                verdict = type(error)
            assert verdict == expected_verdict(self.server, sent)
            assert self.server.ledger.to_json() == before
            if verdict == Next():
                round_.setdefault(sent.worker, sent)
        if round_:
            version = self.server.ledger.version + 1
            self.server.ledger.record(version, list(round_.values()))
            self.server.applied += [
                Applied(version, one.worker, one.sequence, one.digest) for one in round_.values()
            ]

    @rule(back=st.integers(0, 5))
    def forget(self, back: int) -> None:
        version = max(self.server.ledger.version - back, self.server.forgotten_before)
        self.server.ledger.forget_before(version)
        self.server.forgotten_before = version

    @rule()
    def snapshot(self) -> None:
        self.snapshots.append(self.server.copy())

    @rule(which=ANY)
    def crash(self, which: int) -> None:
        self.server = self.snapshots[which % len(self.snapshots)].copy()

    @invariant()
    def each_is_applied_exactly_once_and_in_order(self) -> None:
        for worker in ("a", "b", "c"):
            sequences = [one.sequence for one in self.server.applied if one.worker == worker]
            assert sequences == list(range(1, len(sequences) + 1))

    @invariant()
    def the_ledger_loads_as_it_was_written(self) -> None:
        ledger = self.server.ledger
        assert reloaded(ledger).to_json() == ledger.to_json()

    def teardown(self) -> None:
        # whatever happened: the newest processes send all they made until it is answered
        for worker, process in getattr(self, "newest", {}).items():
            process.epoch = 0
            self.join(process)
            for sequence, contents in sorted(process.made.items()):
                sent = push(worker, process.epoch, sequence)
                sent = Push(**{**vars(sent), "digest": contents})
                if expected_verdict(self.server, sent) == Next():
                    self.network = [sent]
                    self.deliver([0], repeat=False)
            applied = [one.sequence for one in self.server.applied if one.worker == worker]
            assert applied == list(range(1, len(applied) + 1))
            assert len(applied) >= len(process.made)


TestExactlyOnce = ExactlyOnce.TestCase
TestExactlyOnce.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
