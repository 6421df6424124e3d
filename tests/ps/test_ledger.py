"""Each push is applied exactly once, whatever is repeated, reordered, fenced or restored."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from topq_dist.ps.ledger import Entry, Ledger, Next, Repeat
from topq_dist.ps.protocol import (
    START,
    DigestDiffersError,
    ForgottenError,
    InvalidError,
    NotJoinedError,
    OldEpochError,
    Push,
    RefusedError,
    SequenceGapError,
)

A, B, C = (bytes([letter]) * 16 for letter in b"ABC")


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def push(worker: str, epoch: int, sequence: int, contents: str = "") -> Push:
    return Push(
        worker=worker,
        epoch=epoch,
        sequence=sequence,
        base=START,
        frames=(),
        lr=(),
        digest=digest(contents or f"{worker} {sequence}"),
    )


def check(ledger: Ledger, sent: Push) -> Next | Repeat:
    return ledger.check(sent.worker, sent.epoch, sent.sequence, sent.digest)


def reloaded(ledger: Ledger) -> Ledger:
    return Ledger.from_json(json.loads(json.dumps(ledger.to_json())))


def of_two_versions() -> Ledger:
    ledger = Ledger()
    ledger.join("a", A, 0, 0)
    ledger.join("b", B, 0, 0)
    ledger.record(1, [push("a", 1, 1), push("b", 1, 1)])
    ledger.record(2, [push("a", 1, 2)])
    return ledger


def test_a_new_worker_starts_at_one() -> None:
    ledger = Ledger()
    assert ledger.join("a", A, 0, 0) == Entry(worker="a", instance=A, epoch=1, next_sequence=1)
    assert ledger.next_sequence("a") == 1
    assert ledger.workers == ("a",)


def test_joining_again_is_the_same_place() -> None:
    ledger = of_two_versions()
    place = ledger.entry("a")
    assert ledger.join("a", A, 0, 0) == ledger.join("a", A, 1, 7) == place


def test_a_newer_process_fences_the_older_off() -> None:
    ledger = of_two_versions()
    assert ledger.join("a", B, 0, 0) == Entry(worker="a", instance=B, epoch=2, next_sequence=3)
    with pytest.raises(OldEpochError, match=r"'a' in epoch 1: .* epoch 2"):
        check(ledger, push("a", 1, 3))
    with pytest.raises(OldEpochError):
        check(ledger, push("a", 1, 2))  # not even a repeat: its answer is of no use to anybody
    with pytest.raises(OldEpochError):
        ledger.join("a", A, 1, 3)
    assert check(ledger, push("a", 2, 2)) == Repeat(2)
    assert check(ledger, push("a", 2, 3)) == Next()


def test_of_two_processes_in_one_epoch_the_one_in_the_ledger_has_the_name() -> None:
    # a server restored from before B joined as epoch 2 gave that epoch to C
    ledger = of_two_versions()
    ledger.join("a", C, 0, 0)
    with pytest.raises(OldEpochError):
        ledger.join("a", B, 2, 3)


def test_a_ledger_from_before_a_worker_joined_takes_its_epoch_and_number() -> None:
    ledger = of_two_versions()
    assert ledger.join("a", B, 4, 9) == Entry(worker="a", instance=B, epoch=4, next_sequence=3)
    assert ledger.join("c", C, 3, 5) == Entry(worker="c", instance=C, epoch=3, next_sequence=5)


def test_an_epoch_never_given_must_join_again() -> None:
    with pytest.raises(NotJoinedError, match="join again"):
        check(of_two_versions(), push("a", 2, 3))
    with pytest.raises(NotJoinedError, match="join first"):
        check(of_two_versions(), push("c", 1, 1))


def test_verdicts() -> None:
    ledger = of_two_versions()
    assert check(ledger, push("a", 1, 3)) == Next()
    assert check(ledger, push("a", 1, 2)) == Repeat(2)
    assert check(ledger, push("a", 1, 1)) == check(ledger, push("b", 1, 1)) == Repeat(1)
    with pytest.raises(SequenceGapError, match="sent push 4: expected push 3"):
        check(ledger, push("a", 1, 4))
    with pytest.raises(DigestDiffersError, match="version 2"):
        check(ledger, push("a", 1, 2, "other contents"))


def test_what_is_forgotten_is_not_applied_again() -> None:
    ledger = of_two_versions()
    ledger.forget_before(2)
    with pytest.raises(ForgottenError, match="from 2 on"):
        check(ledger, push("a", 1, 1))
    assert check(ledger, push("a", 1, 2)) == Repeat(2)
    with pytest.raises(ForgottenError):
        check(ledger, push("b", 1, 1))
    assert check(ledger, push("b", 1, 2)) == Next()


@pytest.mark.parametrize(
    ("version", "pushes"),
    [
        (2, [push("a", 1, 3)]),
        (4, [push("a", 1, 3)]),
        (3, []),
        (3, [push("b", 1, 2), push("a", 1, 2)]),
        (3, [push("b", 1, 2), push("a", 1, 4)]),
        (3, [push("b", 1, 2), push("a", 2, 3)]),
        (3, [push("b", 1, 2), push("c", 1, 1)]),
        (3, [push("b", 1, 2), push("b", 1, 2)]),
    ],
)
def test_a_wrong_record_changes_nothing(version: int, pushes: list[Push]) -> None:
    ledger = of_two_versions()
    before = ledger.to_json()
    with pytest.raises(ValueError, match="expected"):
        ledger.record(version, pushes)
    assert ledger.to_json() == before


def test_what_no_worker_would_send_is_invalid_and_changes_nothing() -> None:
    ledger = of_two_versions()
    before = ledger.to_json()
    for worker, instance, epoch, number in [
        ("a/b", A, 0, 0),
        ("", A, 0, 0),
        ("d", A[:15], 0, 0),
        ("d", A, -1, 0),
        ("d", A, 0, -1),
        ("d", A, 2**64, 0),
        ("d", A, 0, 2**64),
    ]:
        with pytest.raises(InvalidError):
            ledger.join(worker, instance, epoch, number)
    for sequence, contents in [(0, digest("")), (-1, digest("")), (3, b""), (2**64, digest(""))]:
        with pytest.raises(InvalidError):
            ledger.check("a", 1, sequence, contents)
    assert ledger.to_json() == before


def test_the_largest_claims_of_a_worker_still_load() -> None:
    ledger = Ledger()
    ledger.join("a", A, 2**62, 2**62)
    ledger.join("a", B, 0, 0)
    ledger.record(1, [push("a", 2**62 + 1, 2**62)])
    assert reloaded(ledger).to_json() == ledger.to_json()


def test_json_shares_nothing() -> None:
    ledger = of_two_versions()
    tree = ledger.to_json()
    written = json.dumps(tree)
    ledger.record(3, [push("a", 1, 3)])
    assert json.dumps(tree) == written
    restored = Ledger.from_json(tree)
    restored.record(3, [push("b", 1, 2)])
    assert json.dumps(tree) == written


def altered(path: list[str], value: object) -> dict[str, Any]:
    tree = of_two_versions().to_json()
    place: Any = tree
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["version"], None),
        (["version"], -1),
        (["version"], 1),
        (["version"], "2"),
        (["workers"], []),
        (["workers", "a"], 7),
        (["workers", "a/b"], {}),
        (["workers", "a", "epoch"], 0),
        (["workers", "a", "epoch"], True),
        (["workers", "a", "next_sequence"], 2),
        (["workers", "a", "next_sequence"], 3.0),
        (["workers", "a", "instance"], "00"),
        (["workers", "a", "instance"], "zz"),
        (["workers", "a", "applied"], None),
        (["workers", "a", "applied"], "00"),
        (["workers", "a", "applied"], (struct.pack("<Q", 2) + digest("x")).hex() * 2),
    ],
)
def test_json_that_no_ledger_wrote(path: list[str], value: object) -> None:
    with pytest.raises(ValueError, match="not a ledger"):
        Ledger.from_json(altered(path, value))


# Below, workers and a server as in a run, over a network that repeats and reorders. The reference
# keeps everything that was ever applied in a plain list.


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
    """What a server restores together: the ledger, and the effect of all pushes it applied."""

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
    """What the ledger must say, found by looking through everything that was ever applied."""
    fence = server.fences.get(sent.worker)
    if fence is None or sent.epoch > fence[1]:
        return NotJoinedError
    if sent.epoch < fence[1]:
        return OldEpochError
    applied = server.of(sent.worker)
    if sent.sequence not in applied:
        return Next() if sent.sequence == max(applied, default=0) + 1 else SequenceGapError
    before = applied[sent.sequence]
    if before.version < server.forgotten_before:
        return ForgottenError
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
        except OldEpochError:
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
