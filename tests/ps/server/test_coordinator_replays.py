"""The coordinator after a crash: workers bring back what it lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ps.bench import Make, push_of

from topq_dist.ps.protocol.errors import (
    ExpiredError,
    InvalidError,
    NotJoinedError,
    NotReadyError,
    TooManyWorkersError,
)
from topq_dist.ps.protocol.types import START, ModelVersion, UpdateKind


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
    pending = bench.submit(push_of(a, 1, START))
    bench.clock.pass_s(2)
    alone = bench.answer(pending)
    assert alone.members == ("a",)
    sha256 = bench.sha256()
    bench.crash()
    a = bench.join("a", epoch=a.epoch, held=alone.applied, kept=(1, 2))
    b = bench.join("b", epoch=b.epoch, held=START)
    stranger = bench.submit(push_of(b, 1, START))
    assert bench.answer(bench.submit(push_of(a, 1, START, replay=alone))).members == ("a",)
    assert bench.answer(stranger).applied is None
    assert bench.sha256() == sha256


def test_a_lower_max_lr_after_a_restart_ends_nobody_for_what_was_applied(make: Make) -> None:
    bench = make()
    a = bench.join("a")
    first = replace(push_of(a, 1, START), lr=(2.0,))
    kept = bench.answer(bench.submit(first))
    bench.save()
    second = replace(push_of(a, 2, bench.point), lr=(2.0,))
    lost = bench.answer(bench.submit(second))
    sha256 = bench.sha256()
    bench.serving = replace(bench.serving, max_lr=1.0)
    bench.crash()
    a = bench.join("a", epoch=a.epoch, held=lost.applied, kept=(2, 3))
    assert bench.answer(bench.submit(first)).applied == kept.applied  # a repeat
    again = replace(push_of(a, 2, bench.point, replay=lost), lr=(2.0,))
    assert bench.answer(bench.submit(again)).applied == lost.applied
    assert bench.sha256() == sha256
    with pytest.raises(InvalidError, match=r"lr=2.0: expected at most 1"):
        bench.submit(replace(push_of(a, 3, bench.point), lr=(2.0,)))


def test_one_worker_may_take_its_time_for_its_replays(make: Make) -> None:
    bench = make()
    a = bench.join("a")
    bench.save()
    lost = [bench.round(number, a)[0] for number in range(1, 21)]
    sha256 = bench.sha256()
    bench.crash()
    a = bench.join("a", epoch=a.epoch, held=lost[-1].applied, kept=(1, 21))
    for number, answer in enumerate(lost, start=1):
        pending = bench.submit(push_of(a, number, bench.point, replay=answer))
        bench.clock.pass_s(9.0)
        bench.server.renew(a)
        assert bench.answer(pending).applied == answer.applied
    assert bench.sha256() == sha256


def test_names_that_a_worker_makes_up_take_no_place_after_the_next_restart(make: Make) -> None:
    bench = make(max_workers=2)
    a, b = bench.join("a"), bench.join("b")
    bench.save()
    lost = bench.round(1, a, b)[0]
    bench.crash()
    a = bench.join("a", epoch=a.epoch, held=lost.applied, kept=(1, 2))
    bench.submit(push_of(a, 1, START, replay=replace(lost, members=("a", "x", "y"))))
    assert {member.worker for member in bench.server._leases.all()} == {"a", "b", "x", "y"}
    bench.save()
    bench.crash()
    assert {member.worker for member in bench.server._leases.all()} == {"a", "b"}
    # a third has a place once one of them has not come back in time
    with pytest.raises(NotReadyError, match="waits for a, b to come back"):
        bench.join("c")
    b = bench.join("b", epoch=b.epoch, held=lost.applied, kept=(1, 2))
    bench.clock.pass_s(9)
    bench.server.renew(b)
    bench.clock.pass_s(2)
    bench.join("c")
    with pytest.raises(TooManyWorkersError):
        bench.join("d")


def test_no_round_times_out_while_workers_come_back_after_a_restart(make: Make) -> None:
    bench = make(round_timeout_s=1.0)
    a, b = bench.join("a"), bench.join("b")
    bench.save()
    lost = bench.round(1, a, b)
    sha256 = bench.sha256()
    bench.crash()
    a = bench.join("a", epoch=a.epoch, held=START)  # the answer never arrived
    pending = bench.submit(push_of(a, 1, START))
    bench.clock.pass_s(2)
    assert bench.look(pending) == ("b",)
    b = bench.join("b", epoch=b.epoch, held=lost[1].applied, kept=(1, 2))
    bench.submit(push_of(b, 1, START, replay=lost[1]))
    assert bench.answer(pending).members == ("a", "b")
    assert bench.sha256() == sha256


def test_a_replay_waits_for_a_worker_that_the_snapshot_does_not_know(make: Make) -> None:
    bench = make()
    a = bench.join("a")
    bench.save()
    (first,) = bench.round(1, a)
    b = bench.join("b")
    middle = bench.point
    pendings = [bench.submit(push_of(caller, n, middle)) for caller, n in ((a, 2), (b, 1))]
    both = [bench.answer(pending) for pending in pendings]
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
    pending = bench.submit(push_of(a, 1, START, replay=lost))
    assert bench.look(pending) == ("b",)
    bench.clock.pass_s(9)
    bench.server.renew(a)
    bench.clock.pass_s(2)
    alone = bench.answer(pending)  # b died with the server
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
    pending = bench.submit(push_of(a, 1, last))
    assert bench.look(pending) == ("b",)
    bench.clock.pass_s(9)
    bench.server.renew(a)
    bench.clock.pass_s(2)
    answer = bench.answer(pending)
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
    with pytest.raises(ExpiredError):
        bench.submit(push_of(a, 2, answers[0].applied))  # type: ignore[arg-type]


def test_whom_a_replay_names_takes_no_workers_place(make: Make) -> None:
    bench = make(max_workers=2)
    a = bench.join("a")
    bench.save()
    (lost,) = bench.round(1, a)
    bench.crash()
    a = bench.join("a", epoch=a.epoch, held=lost.applied, kept=(1, 2))
    ghosts = tuple(f"ghost{number}" for number in range(60))
    replay = push_of(a, 1, START, replay=lost)
    pending = bench.submit(replace(replay, members=("a", *ghosts)))
    waiting_for = bench.look(pending)
    assert isinstance(waiting_for, tuple)
    assert len(waiting_for) == 2  # no more than can join, and for a lease
    bench.join("b")
    bench.clock.pass_s(9)
    bench.server.renew(a)
    bench.clock.pass_s(2)
    assert bench.answer(pending).members == ("a",)


def test_replays_are_believed_until_all_have_caught_up_and_no_longer(make: Make) -> None:
    bench = make()
    a, m = bench.join("a"), bench.join("m")
    bench.save()
    lost = bench.round(1, a, m)
    bench.crash()
    callers = [
        bench.join(caller.worker, epoch=caller.epoch, held=lost[0].applied, kept=(1, 2))
        for caller in (a, m)
    ]
    again = [
        bench.submit(push_of(caller, 1, START, replay=answer))
        for caller, answer in zip(callers, lost, strict=True)
    ]
    assert [bench.answer(one).applied for one in again] == [lost[0].applied] * 2
    a, m = callers
    bench.round(2, a, m)
    before, sha256 = bench.point, bench.sha256()
    for version in (3, 10**6):
        # she says as well that she holds what came of it
        far = replace(before, version=version)
        m = bench.join("m", epoch=m.epoch, held=far, kept=(1, 4))
        lie = replace(push_of(m, 3, before, 9.0), applied_version=version, members=("m",))
        assert bench.answer(bench.submit(lie)).applied is None
    assert (bench.point, bench.sha256()) == (before, sha256)
    assert bench.server.status().refused == {"unbelieved_replay": 2}
    assert bench.round(3, a, m)[0].members == ("a", "m")


def test_who_never_comes_back_does_not_keep_replays_believed(make: Make) -> None:
    bench = make()
    a, m = bench.join("a"), bench.join("m")
    bench.save()
    bench.round(1, a, m)
    bench.crash()
    far = ModelVersion(version=10**6, chain=b"?" * 32)
    m = bench.join("m", epoch=m.epoch, held=far, kept=(1, 10**6))
    base = START
    for sequence in range(1, 40):  # a is dead: there is nobody to be ruled
        alone = replace(push_of(m, sequence, base), applied_version=sequence, members=("m",))
        pending = bench.submit(alone)
        bench.clock.pass_s(5)
        bench.server.renew(m)
        answer = bench.look(pending)
        while isinstance(answer, tuple):
            bench.clock.pass_s(5)
            bench.server.renew(m)
            answer = bench.look(pending)
        last = answer.applied
        if last is None:
            break
        base = last
    assert last is None
    assert base.version < 25  # 10 leases of 10 s
