"""The coordinator makes versions: rounds, leases, repeats, and who is refused."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from ps.bench import Make, model_of, push_of

from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.errors import (
    DigestDiffersError,
    FencedError,
    InvalidError,
    ModelDiffersError,
    NonFiniteError,
    NotJoinedError,
    NotReadyError,
    RefusedError,
    TooLargeError,
    TooManyWorkersError,
    WrongRunError,
)
from topq_dist.ps.protocol.types import START, Answer, ModelVersion, Push
from topq_dist.ps.server.run_counters import WorkerReport


def test_who_has_left_is_not_counted_for_ever(make: Make) -> None:
    bench = make()
    counters = bench.server.counters
    bench.join("stays")
    gone = bench.join("gone")
    for worker in ("stays", "gone"):
        counters.take_report(worker, WorkerReport(loss=1.0))
    bench.server.leave(gone)
    bench.join("comes")
    assert counters.worker("stays").report.loss == 1.0
    assert counters.worker("gone").report.loss is None


def test_a_version_takes_one_push_of_each_live_worker(make: Make) -> None:
    bench = make()
    a, b = bench.join("a"), bench.join("b")
    first = bench.submit(push_of(a, 1, START, 2.0))
    assert bench.look(first) == ("b",)
    second = bench.submit(push_of(b, 1, START, 4.0))
    for pending in (first, second):
        answer = bench.answer(pending)
        assert answer.applied == bench.point
        assert answer.members == ("a", "b")
        assert model_of(answer).tolist() == [-3.0] * 4
    assert bench.point.version == 1


def test_the_first_version_waits_for_start_workers_and_none_is_made_of_too_few(make: Make) -> None:
    bench = make(start_workers=2, min_workers=2)
    a = bench.join("a")
    pending = bench.submit(push_of(a, 1, START))
    assert bench.look(pending) == ()
    b = bench.join("b")
    assert bench.look(pending) == ("b",)
    bench.submit(push_of(b, 1, START))
    assert bench.answer(pending).members == ("a", "b")
    lonely = bench.submit(push_of(a, 2, bench.point))
    bench.clock.pass_s(9)
    bench.look(lonely)
    bench.clock.pass_s(2)
    assert bench.look(lonely) == ()  # b is gone, and one worker is fewer than two


def test_a_worker_past_its_lease_holds_nobody_up_and_is_stale_once(make: Make) -> None:
    bench = make()
    a, b = bench.join("a"), bench.join("b")
    pending = bench.submit(push_of(a, 1, START, 3.0))
    bench.clock.pass_s(9)
    assert bench.look(pending) == ("b",)
    bench.clock.pass_s(2)
    assert bench.answer(pending).members == ("a",)
    late = bench.answer(bench.submit(push_of(b, 1, START)))
    assert late.applied is None
    assert model_of(late).tolist() == [-3.0] * 4
    assert bench.server.status().refused == {"stale": 1}
    both = [bench.submit(push_of(caller, n, bench.point)) for caller, n in ((a, 2), (b, 1))]
    assert [bench.answer(pending).members for pending in both] == [("a", "b")] * 2


def test_a_round_closes_without_the_rest_after_its_time(make: Make) -> None:
    bench = make(round_timeout_s=2.0)
    a, b = bench.join("a"), bench.join("b")
    pending = bench.submit(push_of(a, 1, START))
    bench.clock.pass_s(1.9)
    assert bench.look(pending) == ("b",)
    bench.clock.pass_s(0.2)
    assert bench.answer(pending).members == ("a",)
    assert bench.answer(bench.submit(push_of(b, 1, START))).applied is None
    pending = bench.submit(push_of(b, 1, bench.point))
    assert bench.look(pending) == ("a",)  # b stayed a member, and so did a


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
        bench.submit(push_of(a, 1, ModelVersion(version=0, chain=b"x" * 32)))


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
    with pytest.raises(FencedError):
        bench.look(old)
    with pytest.raises(FencedError):
        bench.submit(push_of(a, 1, START, 100.0))
    pending = bench.submit(push_of(b, 1, START, 2.0))
    assert bench.look(pending) == ("a",)
    bench.submit(push_of(newer, 1, START, 2.0))
    assert model_of(bench.answer(pending)).tolist() == [-2.0] * 4


def test_a_process_that_joins_again_keeps_its_waiting_push(make: Make) -> None:
    bench = make()
    a, b = bench.join("a"), bench.join("b")
    pending = bench.submit(push_of(a, 1, START))
    assert bench.join("a", epoch=a.epoch, held=START) == a
    bench.submit(push_of(b, 1, START))
    assert bench.answer(pending).members == ("a", "b")


def test_leaving_lets_the_others_go_on(make: Make) -> None:
    bench = make()
    a, b = bench.join("a"), bench.join("b")
    pending = bench.submit(push_of(a, 1, START))
    assert bench.server.leave(b).version == 1
    assert bench.answer(pending).members == ("a",)
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


def test_what_is_refused_on_joining(make: Make) -> None:
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


def test_a_step_that_was_undone_ends_nobodys_lease_and_leaves_nobody_out(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(round_timeout_s=2.0)
    a, _ = bench.join("a"), bench.join("b")
    central = bench.server._started().central
    apply = central.apply

    def slow(pushes: Sequence[Push]) -> object:
        bench.clock.pass_s(9.0)
        return apply(pushes)

    monkeypatch.setattr(central, "apply", slow)
    poison = bench.submit(replace(push_of(a, 1, START, 3e38), lr=(9.0,)))
    bench.clock.pass_s(3.0)
    with pytest.raises(NonFiniteError, match="would not be finite"):
        bench.look(poison)
    assert bench.server.status().round_workers == 2
    # nothing has come of the round that b missed
    assert bench.look(bench.submit(push_of(a, 1, START))) == ("b",)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_push_that_would_overflow_is_refused_and_training_goes_on(make: Make, mode: str) -> None:
    bench = make({"mode": mode, "options": {"lr": 1.0}}, max_lr=1e308)
    a, b = bench.join("a"), bench.join("b")
    waiting = bench.submit(push_of(a, 1, START))
    base, sha256 = bench.point, bench.sha256()
    for poison in ({"value": 3e38, "lr": 1000.0}, {"value": 1.0, "lr": 1e300}):
        push = push_of(b, 1, START, poison["value"])
        with pytest.raises(NonFiniteError, match=r"'b'.*would not be finite"):
            bench.look(bench.submit(replace(push, lr=(poison["lr"],))))
        assert (bench.point, bench.sha256()) == (base, sha256)
    right = bench.submit(push_of(b, 1, START))
    assert bench.answer(waiting).applied is not None
    answer = bench.answer(right)
    assert answer.applied == bench.point
    assert bench.point.version == (1 if mode == "sync" else 2)


def test_who_lets_a_rounds_time_pass_is_not_waited_for_until_it_pushes(make: Make) -> None:
    bench = make(round_timeout_s=5.0, lease_s=100.0)
    a, b = bench.join("a"), bench.join("b")
    waiting = bench.submit(push_of(a, 1, START))
    assert bench.look(waiting) == ("b",)
    bench.clock.pass_s(5)
    assert bench.answer(waiting).members == ("a",)
    assert bench.server.status().round_workers == 1
    assert bench.round(2, a)[0].members == ("a",)
    assert bench.answer(bench.submit(push_of(b, 1, START))).applied is None  # too late
    waiting = bench.submit(push_of(a, 3, bench.point))
    assert bench.look(waiting) == ("b",)
    bench.submit(push_of(b, 1, bench.point))
    assert bench.answer(waiting).members == ("a", "b")
