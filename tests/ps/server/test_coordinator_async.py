"""The coordinator where each push is a version of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ps.bench import Make, model_of, push_of

from topq_dist.ps.protocol.errors import InvalidError
from topq_dist.ps.protocol.types import START, ModelVersion
from topq_dist.ps.server.push_queue import PendingPush

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
    elsewhere = ModelVersion(version=bench.point.version, chain=b"?" * 32)
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


def test_async_a_slow_way_back_keeps_its_order(make: Make) -> None:
    bench = make(ASYNC)
    callers = [bench.join(worker) for worker in "ab"]
    bench.save()
    lost = [bench.round(1 + n // 2, callers[n % 2], value=1.0 + n)[0] for n in range(30)]
    points = [START, *(answer.applied or START for answer in lost)]
    sha256 = bench.sha256()
    bench.crash()
    for place, one in enumerate(callers):
        callers[place] = bench.join(one.worker, epoch=one.epoch, held=points[-1], kept=(1, 16))

    def replay(n: int) -> PendingPush:
        caller = callers[n % 2]
        return bench.submit(push_of(caller, 1 + n // 2, points[n], 1.0 + n, replay=lost[n]))

    for n in range(0, 30, 2):
        later = replay(n + 1)
        bench.clock.pass_s(9.0)
        for caller in callers:
            bench.server.renew(caller)
        assert bench.look(later) == ("a",)
        assert bench.answer(replay(n)).applied == points[n + 1]
        assert bench.answer(later).applied == points[n + 2]
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
    pending = bench.submit(push_of(b, 1, START, 2.0, replay=two))
    assert bench.look(pending) == ("a",)
    bench.clock.pass_s(9)
    bench.server.renew(b)
    bench.clock.pass_s(2)
    moved = bench.answer(pending)  # a died with the server: version 1 is b's now
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
    far = ModelVersion(version=2**63, chain=bytes(32))
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


def test_async_replays_are_believed_on_the_way_back_and_no_longer(make: Make) -> None:
    bench = make(ASYNC)
    a, m = bench.join("a"), bench.join("m")
    bench.save()
    (lost,) = bench.round(1, a)
    bench.crash()
    m = bench.join("m", epoch=m.epoch, held=START, kept=(1, 2))
    early = replace(push_of(m, 1, START), applied_version=9, members=("m",), lr=(1e30,))
    waiting = bench.submit(early)
    assert bench.look(waiting) == ("a",)
    a = bench.join("a", epoch=a.epoch, held=lost.applied, kept=(1, 2))
    assert bench.answer(bench.submit(push_of(a, 1, START, replay=lost))).applied == lost.applied
    before, sha256 = bench.point, bench.sha256()
    assert bench.answer(waiting).applied is None
    late = replace(push_of(m, 1, before), applied_version=2, members=("m",))
    with pytest.raises(InvalidError, match=r"lr=1e\+30: expected at most 1000"):
        bench.submit(replace(late, lr=(1e30,)))
    assert bench.answer(bench.submit(late)).applied is None
    assert (bench.point, bench.sha256()) == (before, sha256)
    assert bench.server.status().refused == {"unbelieved_replay": 2}
    assert bench.answer(bench.submit(push_of(m, 1, before))).applied == bench.point


def test_async_the_last_version_comes_back_though_its_worker_alone_knows_it(make: Make) -> None:
    bench = make(ASYNC)
    a = bench.join("a")
    bench.save()
    b = bench.join("b")
    (one,) = bench.round(1, a)
    (two,) = bench.round(1, b)
    sha256 = bench.sha256()
    bench.crash()
    a = bench.join("a", epoch=a.epoch, held=one.applied, kept=(1, 2))
    b = bench.join("b", epoch=b.epoch, held=two.applied, kept=(1, 2))
    last = bench.submit(push_of(b, 1, one.applied or START, replay=two))
    assert bench.answer(bench.submit(push_of(a, 1, START, replay=one))).applied == one.applied
    bench.submit(push_of(a, 2, one.applied or START))
    assert bench.answer(last).applied == two.applied
    assert bench.sha256() != sha256  # the new one comes after it
    assert bench.point.version == 3
