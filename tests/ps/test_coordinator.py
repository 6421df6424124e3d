"""The coordinator in one process: threads, a clock that the test moves, and crashes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from topq_dist.compress.frame import Frame
from topq_dist.ps.calls import Caller, JoinCall
from topq_dist.ps.config import ServingConfig, TrainingConfig
from topq_dist.ps.coordinator import Coordinator
from topq_dist.ps.model import FlatModel, ModelSpec
from topq_dist.ps.pending import Ticket
from topq_dist.ps.protocol import (
    START,
    Answer,
    DigestDiffersError,
    ForgottenError,
    InvalidError,
    ModelDiffersError,
    NotJoinedError,
    NotReadyError,
    OldEpochError,
    Point,
    Push,
    RefusedError,
    TooLargeError,
    TooManyWorkersError,
    UpdateKind,
    WrongRunError,
    push_digest,
)
from topq_dist.ps.run_state import RunState
from topq_dist.ps.snapshot import StateDir

SPEC = ModelSpec.of([("w", torch.zeros(4))])
NEVER = 10**9


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


def push_of(
    caller: Caller, sequence: int, base: Point, value: float = 1.0, *, replay: Answer | None = None
) -> Push:
    values = torch.full((4,), value)
    frame = Frame(numel=4, indices=torch.arange(4), values=values.clone(), finite=True)
    return Push(
        worker=caller.worker,
        epoch=caller.epoch,
        sequence=sequence,
        base=base,
        frames=(frame,),
        lr=(),
        digest=push_digest((), [values.numpy().data.cast("B")]),
        applied_version=replay.applied.version if replay and replay.applied else 0,
        members=replay.members if replay else (),
    )


@dataclass
class Bench:
    """A coordinator that can crash and come back, and what its workers would say."""

    path: Path
    training: TrainingConfig
    serving: ServingConfig
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.state_dir = StateDir(self.path)
        self.server = Coordinator(self.training, self.serving, self.state_dir, clock=self.clock)

    def crash(self) -> None:
        """End without a drain: what is not durable is lost."""
        self.server._saver.close()
        self.state_dir.close()
        self.restart()

    def save(self) -> None:
        self.server._save()

    def join(
        self,
        worker: str,
        *,
        instance: bytes | None = None,
        epoch: int = 0,
        held: Point | None = None,
        kept: tuple[int, int] | None = None,
        run: str | None = None,
        spec: ModelSpec = SPEC,
    ) -> Caller:
        """Join, and bring a model of zeros where told to; `kept` is (first, next) sequence."""
        joined = self.server.join(
            JoinCall(
                run=self.server.run if held is not None and run is None else run or "",
                worker=worker,
                instance=instance or worker.encode().ljust(16, b"."),
                epoch=epoch,
                next_sequence=0 if kept is None else kept[1],
                held=held,
                first_kept=0 if kept is None else kept[0],
                spec=spec,
            ),
            wait_s=0.05,
        )
        if joined.upload:
            self.server.upload(joined.caller, FlatModel(spec).raw())
        return joined.caller

    @property
    def point(self) -> Point:
        return self.server.status().point

    def submit(self, push: Push) -> Ticket:
        return self.server.submit(self.server.run, push)

    def look(self, ticket: Ticket) -> Answer | tuple[str, ...]:
        return self.server.wait(ticket, 0.0)

    def answer(self, ticket: Ticket) -> Answer:
        answer = self.look(ticket)
        assert isinstance(answer, Answer), answer
        return answer

    def round(self, sequence: int, *callers: Caller, value: float = 1.0) -> list[Answer]:
        """Push for each worker on the present point, and return the answers."""
        base = self.point
        tickets = [self.submit(push_of(c, sequence, base, value)) for c in callers]
        return [self.answer(ticket) for ticket in tickets]

    def sha256(self) -> str:
        return self.server.status(state_sha256=True).state_sha256


Make = Callable[..., Bench]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Bench] = []

    def make_bench(training: dict[str, Any] | None = None, **serving: Any) -> Bench:
        options = {"inner_opt": "sgd", "options": {"lr": 1.0, "momentum": 0.5}} | (training or {})
        serving = {"snapshot_every": NEVER, "lease_s": 10.0} | serving
        path = tmp_path / str(len(made))
        made.append(Bench(path, TrainingConfig(**options), ServingConfig(**serving)))
        return made[-1]

    yield make_bench
    for bench in made:
        bench.server._saver.close()
        bench.state_dir.close()


def model_of(answer: Answer, held: FlatModel | None = None) -> Tensor:
    from topq_dist.ps.downlink import apply_update

    model = held or FlatModel(SPEC)
    for update in answer.updates:
        apply_update(model, update)
    return model.flats[0]


def test_a_version_takes_one_push_of_each_live_worker(make: Make) -> None:
    bench = make()
    a, b = bench.join("a"), bench.join("b")
    first = bench.submit(push_of(a, 1, START, 2.0))
    assert bench.look(first) == ("b",)
    second = bench.submit(push_of(b, 1, START, 4.0))
    for ticket in (first, second):
        answer = bench.answer(ticket)
        assert answer.applied == bench.point
        assert answer.members == ("a", "b")
        assert model_of(answer).tolist() == [-3.0] * 4
    assert bench.point.version == 1


def test_the_first_version_waits_for_start_workers_and_none_is_made_of_too_few(make: Make) -> None:
    bench = make(start_workers=2, min_workers=2)
    a = bench.join("a")
    ticket = bench.submit(push_of(a, 1, START))
    assert bench.look(ticket) == ()
    b = bench.join("b")
    assert bench.look(ticket) == ("b",)
    bench.submit(push_of(b, 1, START))
    assert bench.answer(ticket).members == ("a", "b")
    lonely = bench.submit(push_of(a, 2, bench.point))
    bench.clock.pass_s(9)
    bench.look(lonely)
    bench.clock.pass_s(2)
    assert bench.look(lonely) == ()  # b is gone, and one worker is fewer than two


def test_a_worker_past_its_lease_holds_nobody_up_and_is_stale_once(make: Make) -> None:
    bench = make()
    a, b = bench.join("a"), bench.join("b")
    ticket = bench.submit(push_of(a, 1, START, 3.0))
    bench.clock.pass_s(9)
    assert bench.look(ticket) == ("b",)
    bench.clock.pass_s(2)
    assert bench.answer(ticket).members == ("a",)
    late = bench.answer(bench.submit(push_of(b, 1, START)))
    assert late.applied is None
    assert model_of(late).tolist() == [-3.0] * 4
    assert bench.server.status().refused == {"stale": 1}
    both = [bench.submit(push_of(caller, n, bench.point)) for caller, n in ((a, 2), (b, 1))]
    assert [bench.answer(ticket).members for ticket in both] == [("a", "b")] * 2


def test_a_round_closes_without_the_rest_after_its_time(make: Make) -> None:
    bench = make(round_timeout_s=2.0)
    a, b = bench.join("a"), bench.join("b")
    ticket = bench.submit(push_of(a, 1, START))
    bench.clock.pass_s(1.9)
    assert bench.look(ticket) == ("b",)
    bench.clock.pass_s(0.2)
    assert bench.answer(ticket).members == ("a",)
    assert bench.answer(bench.submit(push_of(b, 1, START))).applied is None
    ticket = bench.submit(push_of(b, 1, bench.point))
    assert bench.look(ticket) == ("a",)  # b stayed a member, and so did a


def test_one_push_arriving_twice_at_once_is_applied_once(make: Make) -> None:
    bench = make()
    a, b = bench.join("a"), bench.join("b")
    with ThreadPoolExecutor(4) as pool:
        waits = [
            pool.submit(lambda: bench.server.wait(bench.submit(push_of(a, 1, START)), 5.0))
            for _ in range(3)
        ]
        time.sleep(0.1)
        bench.answer(bench.submit(push_of(b, 1, START)))
        answers = [wait.result() for wait in waits]
    assert all(isinstance(answer, Answer) for answer in answers)
    assert answers[0] == answers[1] == answers[2]
    assert bench.point.version == 1


def test_a_repeat_is_answered_as_before_and_not_applied(make: Make) -> None:
    bench = make()
    a = bench.join("a")
    (first,) = bench.round(1, a)
    (second,) = bench.round(2, a)
    sha256 = bench.sha256()
    again = bench.answer(bench.submit(push_of(a, 1, START)))
    assert again == first
    assert first.applied is not None
    latest = bench.answer(bench.submit(push_of(a, 2, first.applied)))
    assert latest == second
    with pytest.raises(DigestDiffersError):
        bench.submit(push_of(a, 1, START, 7.0))
    assert bench.sha256() == sha256


def test_a_waiting_push_cannot_be_swapped_for_another(make: Make) -> None:
    bench = make()
    a, _ = bench.join("a"), bench.join("b")
    bench.submit(push_of(a, 1, START))
    with pytest.raises(DigestDiffersError):
        bench.submit(push_of(a, 1, START, 7.0))
    with pytest.raises(InvalidError, match="another base"):
        bench.submit(push_of(a, 1, Point(version=0, chain=b"x" * 32)))


def test_a_push_whose_sender_is_gone_still_counts(make: Make) -> None:
    bench = make()
    a, b = bench.join("a"), bench.join("b")
    bench.submit(push_of(a, 1, START, 2.0))
    bench.clock.pass_s(9)
    bench.server.renew(b)
    bench.clock.pass_s(9)  # a's lease has ended, its push is there
    answer = bench.answer(bench.submit(push_of(b, 1, START, 4.0)))
    assert answer.members == ("a", "b")
    repeat = bench.answer(bench.submit(push_of(a, 1, START, 2.0)))
    assert repeat == answer


def test_when_every_lease_has_ended_the_next_call_goes_on(make: Make) -> None:
    bench = make()
    a, b = bench.join("a"), bench.join("b")
    bench.submit(push_of(a, 1, START))
    bench.clock.pass_s(100)
    answer = bench.answer(bench.submit(push_of(a, 1, START)))
    assert answer.members == ("a",)
    late = bench.answer(bench.submit(push_of(b, 1, START)))
    assert late.applied is None


def test_a_new_process_fences_the_old_one_and_its_waiting_push_off(make: Make) -> None:
    bench = make()
    a, b = bench.join("a"), bench.join("b")
    old = bench.submit(push_of(a, 1, START, 100.0))
    newer = bench.join("a", instance=b"another process.")
    assert newer.epoch == a.epoch + 1
    with pytest.raises(OldEpochError):
        bench.look(old)
    with pytest.raises(OldEpochError):
        bench.submit(push_of(a, 1, START, 100.0))
    ticket = bench.submit(push_of(b, 1, START, 2.0))
    assert bench.look(ticket) == ("a",)
    bench.submit(push_of(newer, 1, START, 2.0))
    assert model_of(bench.answer(ticket)).tolist() == [-2.0] * 4


def test_a_process_that_joins_again_keeps_its_waiting_push(make: Make) -> None:
    bench = make()
    a, b = bench.join("a"), bench.join("b")
    ticket = bench.submit(push_of(a, 1, START))
    assert bench.join("a", epoch=a.epoch, held=START) == a
    bench.submit(push_of(b, 1, START))
    assert bench.answer(ticket).members == ("a", "b")


def test_leaving_lets_the_others_go_on(make: Make) -> None:
    bench = make()
    a, b = bench.join("a"), bench.join("b")
    ticket = bench.submit(push_of(a, 1, START))
    assert bench.server.leave(b).version == 1
    assert bench.answer(ticket).members == ("a",)
    assert bench.server.status().durable_version == 1
    assert bench.server.leave(b).version == 1  # its answer was lost
    with pytest.raises(NotJoinedError):
        bench.submit(push_of(b, 1, bench.point))


def test_draining_sends_who_waits_away_and_keeps_what_was_applied(make: Make) -> None:
    bench = make()
    a, b = bench.join("a"), bench.join("b")
    bench.round(1, a, b)
    point, sha256 = bench.point, bench.sha256()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(bench.server.wait, bench.submit(push_of(a, 2, point)), 30.0)
        time.sleep(0.05)
        bench.server.drain()
        with pytest.raises(NotReadyError, match="shutting down"):
            waiting.result(5)
    with pytest.raises(NotReadyError):
        bench.submit(push_of(b, 2, point))
    bench.state_dir.close()
    bench.restart()
    assert (bench.point, bench.sha256()) == (point, sha256)


def test_what_is_refused_at_the_door(make: Make) -> None:
    bench = make(max_workers=2, max_model_bytes=64)
    with pytest.raises(TooLargeError):
        bench.join("a", spec=ModelSpec.of([("w", torch.zeros(17))]))
    a = bench.join("a")
    bench.join("b")
    with pytest.raises(TooManyWorkersError):
        bench.join("c")
    with pytest.raises(ModelDiffersError, match="'w' has shape"):
        bench.join("b", spec=ModelSpec.of([("w", torch.zeros(2, 2))]))
    with pytest.raises(WrongRunError):
        bench.join("b", held=START, run="0123")
    with pytest.raises(WrongRunError):
        bench.server.renew(replace(a, run="0123"))
    with pytest.raises(NotJoinedError):
        bench.server.renew(replace(a, worker="c"))
    with pytest.raises(NotJoinedError):
        bench.server.renew(replace(a, epoch=a.epoch + 1))
    bench.clock.pass_s(11)
    assert bench.join("c").worker == "c"  # whoever was there is gone
    assert {view.worker for view in bench.server.status().workers} <= {"b", "c"}


def test_the_model_is_brought_by_the_next_where_the_first_is_gone(make: Make) -> None:
    bench = make()
    call = JoinCall(
        run="",
        worker="a",
        instance=b"a" * 16,
        epoch=0,
        next_sequence=0,
        held=None,
        first_kept=0,
        spec=SPEC,
    )
    assert bench.server.join(call).upload
    with pytest.raises(NotReadyError, match="still bringing"):
        bench.join("b")
    bench.clock.pass_s(11)
    b = bench.join("b")
    assert bench.server.fetch(b, central=False)[0] == START
    assert bench.server.status().durable_version == 0
    # the first comes back late: the model is there
    a = bench.server.join(call)
    assert not a.upload
    bench.server.upload(a.caller, [memoryview(b"x")])
    assert bytes(bench.server.fetch(b, central=True)[2][0]) == bytes(16)


def test_an_optimizer_that_raises_ends_everything(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(snapshot_every=1)
    a, b = bench.join("a"), bench.join("b")

    def fail(*_: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(bench.server._state.central, "apply", fail)  # type: ignore[union-attr]
    ticket = bench.submit(push_of(a, 1, START))
    with pytest.raises(NotReadyError, match="started again"):
        bench.submit(push_of(b, 1, START))
    assert bench.server.failed
    with pytest.raises(NotReadyError):
        bench.look(ticket)
    with pytest.raises(NotReadyError):
        bench.join("a")
    bench.server.drain()
    bench.state_dir.close()
    bench.restart()
    assert bench.point == START


def test_a_version_in_the_making_is_no_failure(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # whoever ends the process looks at `failed` without the lock, at any moment
    bench = make()
    a = bench.join("a")
    central = bench.server._state.central  # type: ignore[union-attr]
    apply, seen = central.apply, []

    def watched(pushes: Sequence[Push]) -> object:
        seen.append(bench.server.failed)
        return apply(pushes)

    monkeypatch.setattr(central, "apply", watched)
    bench.round(1, a)
    assert seen == [False]


def test_with_a_snapshot_each_version_no_answer_comes_before_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(snapshot_every=1)
    a = bench.join("a")
    gate = threading.Event()
    save = bench.state_dir.save

    def slow_save(snapshot: Any) -> None:
        gate.wait(10)
        save(snapshot)

    monkeypatch.setattr(bench.state_dir, "save", slow_save)
    ticket = bench.submit(push_of(a, 1, START))
    assert bench.server.wait(ticket, 0.1) == ()
    assert bench.server.status().durable_version == 0
    gate.set()
    answer = bench.server.wait(ticket, 10)
    assert isinstance(answer, Answer)
    assert answer.durable_version == 1


def test_a_disk_that_is_full_for_a_while_loses_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(snapshot_every=1)
    a = bench.join("a")
    save = bench.state_dir.save
    failures = iter([OSError("no space left"), None])

    def full_save(snapshot: Any) -> None:
        failure = next(failures, None)
        if failure is not None:
            raise failure
        save(snapshot)

    monkeypatch.setattr(bench.state_dir, "save", full_save)
    answer = bench.server.wait(bench.submit(push_of(a, 1, START)), 10)
    assert isinstance(answer, Answer)
    assert answer.durable_version == 1


# after a crash


def test_a_restarted_server_makes_everybody_join_again_and_replays(make: Make) -> None:
    bench = make()
    a, b = bench.join("a"), bench.join("b")
    bench.round(1, a, b, value=0.5)
    bench.save()
    (lost, _), base = bench.round(2, a, b, value=0.25), bench.point
    assert lost.applied == base
    sha256, before = bench.sha256(), lost.applied
    bench.crash()
    restored = bench.point
    assert restored.version == 1
    with pytest.raises(NotJoinedError):
        bench.submit(push_of(a, 3, before))
    a = bench.join("a", epoch=a.epoch, held=before, kept=(2, 3))
    first = bench.submit(push_of(a, 2, restored, 0.25, replay=lost))
    assert bench.look(first) == ("b",)
    b = bench.join("b", epoch=b.epoch, held=restored, kept=None)
    # b never saw the answer: it sends the same again, and knows nothing of a replay
    second = bench.submit(push_of(b, 2, restored, 0.25))
    assert bench.answer(first).applied == before
    assert bench.answer(second).members == ("a", "b")
    assert bench.sha256() == sha256


def test_a_replay_is_made_of_the_same_workers_again(make: Make) -> None:
    bench = make(round_timeout_s=1.0)
    a, b = bench.join("a"), bench.join("b")
    bench.save()
    ticket = bench.submit(push_of(a, 1, START))
    bench.clock.pass_s(2)
    alone = bench.answer(ticket)
    assert alone.members == ("a",)
    sha256 = bench.sha256()
    bench.crash()
    a = bench.join("a", epoch=a.epoch, held=alone.applied, kept=(1, 2))
    b = bench.join("b", epoch=b.epoch, held=START)
    stranger = bench.submit(push_of(b, 1, START))
    assert bench.answer(bench.submit(push_of(a, 1, START, replay=alone))).members == ("a",)
    assert bench.answer(stranger).applied is None
    assert bench.sha256() == sha256


def test_no_round_times_out_while_workers_come_back_after_a_restart(make: Make) -> None:
    bench = make(round_timeout_s=1.0)
    a, b = bench.join("a"), bench.join("b")
    bench.save()
    lost = bench.round(1, a, b)
    sha256 = bench.sha256()
    bench.crash()
    a = bench.join("a", epoch=a.epoch, held=START)  # the answer never arrived
    ticket = bench.submit(push_of(a, 1, START))
    bench.clock.pass_s(2)
    assert bench.look(ticket) == ("b",)
    b = bench.join("b", epoch=b.epoch, held=lost[1].applied, kept=(1, 2))
    bench.submit(push_of(b, 1, START, replay=lost[1]))
    assert bench.answer(ticket).members == ("a", "b")
    assert bench.sha256() == sha256


def test_a_replay_waits_for_a_worker_that_the_snapshot_does_not_know(make: Make) -> None:
    bench = make()
    a = bench.join("a")
    bench.save()
    (first,) = bench.round(1, a)
    b = bench.join("b")
    middle = bench.point
    tickets = [bench.submit(push_of(caller, n, middle)) for caller, n in ((a, 2), (b, 1))]
    both = [bench.answer(ticket) for ticket in tickets]
    sha256, last = bench.sha256(), bench.point
    bench.crash()
    # b comes first, with a push on a version that this server has yet to reach
    b = bench.join("b", epoch=b.epoch, held=last, kept=(1, 2))
    ahead = bench.submit(push_of(b, 1, middle, replay=both[1]))
    assert bench.look(ahead) == ("a",)
    a = bench.join("a", epoch=a.epoch, held=last, kept=(1, 3))
    assert bench.answer(bench.submit(push_of(a, 1, START, replay=first))).applied == middle
    assert bench.answer(bench.submit(push_of(a, 2, middle, replay=both[0]))).applied == last
    assert bench.answer(ahead).applied == last
    assert bench.sha256() == sha256


def test_a_replay_waits_one_lease_for_its_members_and_no_more(make: Make) -> None:
    bench = make()
    a = bench.join("a")
    bench.save()
    b = bench.join("b")
    (lost, _) = bench.round(1, a, b)
    bench.crash()
    a = bench.join("a", epoch=a.epoch, held=lost.applied, kept=(1, 2))
    ticket = bench.submit(push_of(a, 1, START, replay=lost))
    assert bench.look(ticket) == ("b",)
    bench.clock.pass_s(9)
    bench.server.renew(a)
    bench.clock.pass_s(2)
    alone = bench.answer(ticket)  # b died with the server
    assert alone.members == ("a",)
    assert alone.applied is not None
    assert alone.applied.chain != lost.applied.chain  # type: ignore[union-attr]


def test_a_push_ahead_of_all_that_can_come_back_is_stale(make: Make) -> None:
    bench = make()
    a, b = bench.join("a"), bench.join("b")
    bench.save()
    bench.round(1, a, b)
    last = bench.point
    bench.crash()
    # a has nothing to replay (it was killed too, and resumed), and b has died for good
    a = bench.join("a", instance=b"another process.", held=last)
    ticket = bench.submit(push_of(a, 1, last))
    assert bench.look(ticket) == ("b",)
    bench.clock.pass_s(9)
    bench.server.renew(a)
    bench.clock.pass_s(2)
    answer = bench.answer(ticket)
    assert answer.applied is None
    assert [update.kind for update in answer.updates] == [UpdateKind.FULL]
    assert answer.updates[0].point == START


def test_a_replay_that_names_others_only_is_refused(make: Make) -> None:
    bench = make()
    a = bench.join("a")
    replay = replace(push_of(a, 1, START), applied_version=1, members=("b",))
    with pytest.raises(InvalidError, match="expected itself"):
        bench.submit(replay)


def test_a_repeat_that_cannot_be_answered_faithfully_is_refused(make: Make) -> None:
    bench = make(history_bytes=0)
    a = bench.join("a")
    answers = [bench.round(number, a)[0] for number in (1, 2, 3)]
    assert answers[1].applied is not None
    again = bench.answer(bench.submit(push_of(a, 3, answers[1].applied)))
    assert again == answers[2]
    with pytest.raises(ForgottenError):
        bench.submit(push_of(a, 2, answers[0].applied))  # type: ignore[arg-type]


def test_a_snapshot_of_each_version_does_not_grow_with_the_history(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("topq_dist.ps.run_state._HISTORY_BYTES", 5000)
    bench = make()
    a = bench.join("a")
    state, lengths = bench.server._state, []
    assert state is not None
    for sequence in range(1, 30):
        (answer,) = bench.round(sequence, a)
        lengths.append(len(state.snapshot((), every=1).history["versions"]))
    assert lengths[:3] == [1, 2, 3]
    assert lengths[-1] == lengths[-10] < 5
    assert len(state.snapshot((), every=1000).history["versions"]) == 29
    again = bench.answer(bench.submit(push_of(a, 29, bench.point)))
    assert again.applied == answer.applied


# asynchronous


ASYNC = {"mode": "async", "max_staleness": 2}


def test_async_applies_at_once_and_refuses_what_is_too_stale(make: Make) -> None:
    bench = make(ASYNC)
    a, b = bench.join("a"), bench.join("b")
    points = [bench.round(number, a)[0].applied or START for number in (1, 2)]
    late = bench.answer(bench.submit(push_of(b, 1, START)))
    assert late.applied == bench.point
    assert late.members == ("b",)
    assert late.updates[-1].point == bench.point
    bench.round(3, a)
    held = model_of(bench.answer(bench.submit(push_of(b, 2, points[1]))))
    bench.round(4, a)
    elsewhere = Point(version=bench.point.version, chain=b"?" * 32)
    assert bench.answer(bench.submit(push_of(b, 3, elsewhere))).applied is None
    stale = bench.answer(bench.submit(push_of(b, 3, points[1])))
    assert stale.applied is None
    assert stale.updates[-1].point == bench.point
    assert model_of(stale).tolist() < held.tolist()
    assert bench.server.status().refused == {"stale": 2}


def test_async_replays_are_applied_where_they_were(make: Make) -> None:
    bench = make(ASYNC)
    a, b = bench.join("a"), bench.join("b")
    bench.save()
    (one,) = bench.round(1, a, value=1.0)
    (two,) = bench.round(1, b, value=2.0)
    (three,) = bench.round(2, a, value=3.0)
    sha256, last = bench.sha256(), bench.point
    bench.crash()
    a = bench.join("a", epoch=a.epoch, held=last, kept=(1, 3))
    assert bench.answer(bench.submit(push_of(a, 1, START, 1.0, replay=one))).applied == one.applied
    waiting = bench.submit(push_of(a, 2, two.applied or START, 3.0, replay=three))
    assert bench.look(waiting) == ("b",)
    b = bench.join("b", epoch=b.epoch, held=two.applied, kept=(1, 2))
    replayed = bench.answer(bench.submit(push_of(b, 1, one.applied or START, 2.0, replay=two)))
    assert replayed.applied == two.applied
    assert bench.answer(waiting).applied == last
    assert bench.sha256() == sha256


def test_async_new_pushes_wait_until_the_old_way_is_walked(make: Make) -> None:
    bench = make(ASYNC)
    a, b = bench.join("a"), bench.join("b")
    bench.save()
    (one,) = bench.round(1, a, value=1.0)
    bench.crash()
    b = bench.join("b", epoch=b.epoch, held=START)
    new = bench.submit(push_of(b, 1, START, 9.0))
    assert bench.look(new) == ("a",)
    a = bench.join("a", epoch=a.epoch, held=one.applied, kept=(1, 2))
    assert bench.answer(bench.submit(push_of(a, 1, START, 1.0, replay=one))).applied == one.applied
    assert bench.answer(new).members == ("b",)
    assert bench.point.version == 2


def test_async_goes_on_where_a_replay_is_lost_for_good(make: Make) -> None:
    bench = make(ASYNC)
    a, b = bench.join("a"), bench.join("b")
    bench.save()
    bench.round(1, a, value=1.0)
    two = bench.answer(bench.submit(push_of(b, 1, START, 2.0)))
    assert two.applied is not None
    assert two.applied.version == 2
    bench.crash()
    b = bench.join("b", epoch=b.epoch, held=two.applied, kept=(1, 2))
    ticket = bench.submit(push_of(b, 1, START, 2.0, replay=two))
    assert bench.look(ticket) == ("a",)
    bench.clock.pass_s(9)
    bench.server.renew(b)
    bench.clock.pass_s(2)
    moved = bench.answer(ticket)  # a died with the server: version 1 is b's now
    assert moved.applied is not None
    assert moved.applied.version == 1
    new = bench.answer(bench.submit(push_of(b, 2, bench.point)))
    assert new.applied == bench.point


def test_async_does_not_wait_for_ever_for_who_comes_back_and_sends_nothing(make: Make) -> None:
    bench = make(ASYNC)
    a, b = bench.join("a"), bench.join("b")
    bench.save()
    bench.round(1, a, value=1.0)
    bench.crash()
    far = Point(version=2**63, chain=bytes(32))
    a = bench.join("a", epoch=a.epoch, held=far)
    b = bench.join("b", epoch=b.epoch, held=START)
    new = bench.submit(push_of(b, 1, START, 9.0))
    for _ in range(25):
        assert bench.look(new) == ("a",)
        bench.clock.pass_s(4)
        bench.server.renew(a)
        bench.server.renew(b)
    assert bench.answer(new).members == ("b",)
    assert bench.answer(bench.submit(push_of(b, 2, bench.point))).members == ("b",)


def test_async_what_was_never_answered_takes_its_old_place(make: Make) -> None:
    bench = make(ASYNC)
    a, b = bench.join("a"), bench.join("b")
    bench.save()
    bench.round(1, a, value=1.0)  # its answer never arrived
    two = bench.answer(bench.submit(push_of(b, 1, START, 2.0)))
    sha256 = bench.sha256()
    bench.crash()
    b = bench.join("b", epoch=b.epoch, held=two.applied, kept=(1, 2))
    replay = bench.submit(push_of(b, 1, START, 2.0, replay=two))
    a = bench.join("a", epoch=a.epoch, held=START)
    bench.submit(push_of(a, 1, START, 1.0))
    assert bench.answer(replay).applied == two.applied
    assert bench.sha256() == sha256


def test_refusals_are_counted_and_change_nothing(make: Make) -> None:
    bench = make()
    a = bench.join("a")
    bench.round(1, a)
    sha256 = bench.sha256()
    for wrong in (
        replace(push_of(a, 2, bench.point), lr=(1.0, 2.0)),
        replace(push_of(a, 2, bench.point), lr=(float("nan"),)),
        replace(push_of(a, 2, bench.point), lr=(-1.0,)),
        push_of(a, 3, bench.point),
        push_of(replace(a, epoch=0), 2, bench.point),
    ):
        with pytest.raises(RefusedError):
            bench.submit(wrong)
    assert bench.sha256() == sha256
    assert bench.point.version == 1


def test_nobody_gets_a_model_before_it_is_durable(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    gate = threading.Event()
    save = bench.state_dir.save

    def slow_save(snapshot: Any) -> None:
        gate.wait(10)
        save(snapshot)

    monkeypatch.setattr(bench.state_dir, "save", slow_save)
    with ThreadPoolExecutor(1) as pool:
        uploading = pool.submit(bench.join, "a")
        while bench.server.status().numel == 0:
            time.sleep(0.01)
        with pytest.raises(NotReadyError):
            bench.join("b")
        gate.set()
        a = uploading.result(10)
    assert bench.server.fetch(bench.join("b"), central=False)[0] == START
    bench.crash()
    assert bench.join("a", epoch=a.epoch, held=START).worker == "a"


def test_waiting_threads_see_a_lease_end_by_themselves(tmp_path: Path) -> None:
    bench = Bench(
        tmp_path,
        TrainingConfig(inner_opt="sgd"),
        ServingConfig(lease_s=0.4, snapshot_every=NEVER),
        clock=time.monotonic,  # type: ignore[arg-type]
    )
    try:
        a, _ = bench.join("a"), bench.join("b")
        ticket = bench.submit(push_of(a, 1, START))
        started_s = time.monotonic()
        answer = bench.server.wait(ticket, 30.0)
        assert isinstance(answer, Answer)
        assert answer.members == ("a",)
        assert 0.2 < time.monotonic() - started_s < 10
    finally:
        bench.server._saver.close()
        bench.state_dir.close()


def test_many_threads_at_once_count_each_push_once(make: Make) -> None:
    bench = make({"options": {"lr": 1.0}}, start_workers=6, round_timeout_s=None)
    names = [f"w{number}" for number in range(6)]
    callers = [bench.join(name) for name in names]
    rounds = 15

    def work(caller: Caller) -> Point:
        base = START
        for sequence in range(1, rounds + 1):
            for _ in range(2):  # each is sent twice, one after or beside the other
                ticket = bench.submit(push_of(caller, sequence, base))
            answer = bench.server.wait(ticket, 30.0)
            assert isinstance(answer, Answer)
            assert answer.applied is not None
            assert answer.members == tuple(names)
            base = answer.updates[-1].point
        return base

    with ThreadPoolExecutor(6) as pool:
        points = list(pool.map(work, callers))
    assert set(points) == {bench.point}
    assert bench.point.version == rounds
    raw = bench.server.fetch(callers[0], central=True)[2][0]
    values = torch.frombuffer(bytearray(raw), dtype=torch.float32)
    torch.testing.assert_close(values, torch.full((4,), -float(rounds)))


def test_no_lease_ends_while_the_state_is_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make(start_workers=2, lease_s=10.0)
    caller = bench.join("a")
    bench.join("b")
    for name in ("sha256", "snapshot", "full"):
        read = getattr(RunState, name)

        def slowly(state: RunState, *args: Any, read: Any = read, **options: Any) -> Any:
            bench.clock.pass_s(60)
            return read(state, *args, **options)

        monkeypatch.setattr(RunState, name, slowly)
    bench.server.status(state_sha256=True)
    bench.save()
    bench.server.fetch(caller, central=False)
    assert all(worker.lease_left_s > 0 for worker in bench.server.status().workers)
