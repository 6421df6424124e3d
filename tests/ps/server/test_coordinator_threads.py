"""The coordinator among threads that call it all at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ps.bench import NEVER, Bench, Make, push_of

from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig
from topq_dist.ps.protocol.errors import NotReadyError
from topq_dist.ps.protocol.types import START, Answer, ModelVersion
from topq_dist.ps.server.push_queue import Waiters
from topq_dist.ps.server.requests import WorkerId
from topq_dist.ps.state.run_state import RunState


def test_waiting_threads_see_a_lease_end_by_themselves(tmp_path: Path) -> None:
    bench = Bench(
        tmp_path,
        TrainingConfig(inner_opt="sgd"),
        ServingConfig(lease_s=0.4, snapshot_every=NEVER),
        clock=time.monotonic,  # type: ignore[arg-type]
    )
    try:
        a, _ = bench.join("a"), bench.join("b")
        pending = bench.submit(push_of(a, 1, START))
        started_s = time.monotonic()
        answer = bench.server.wait(pending, 30.0)
        assert isinstance(answer, Answer)
        assert answer.members == ("a",)
        assert 0.2 < time.monotonic() - started_s < 10
    finally:
        bench.server._snapshotter.close()
        bench.state_dir.close()


def test_many_threads_at_once_count_each_push_once(make: Make) -> None:
    bench = make({"options": {"lr": 1.0}}, start_workers=6, round_timeout_s=None)
    names = [f"w{number}" for number in range(6)]
    callers = [bench.join(name) for name in names]
    rounds = 15

    def work(caller: WorkerId) -> ModelVersion:
        base = START
        for sequence in range(1, rounds + 1):
            for _ in range(2):  # each is sent twice, one after or beside the other
                pending = bench.submit(push_of(caller, sequence, base))
            answer = bench.server.wait(pending, 30.0)
            assert isinstance(answer, Answer)
            assert answer.applied is not None
            assert answer.members == tuple(names)
            base = answer.updates[-1].point
        return base

    with ThreadPoolExecutor(6) as pool:
        points = list(pool.map(work, callers))
    assert set(points) == {bench.point}
    assert bench.point.version == rounds
    raw = bench.server.fetch(callers[0], central=True)[0].payloads[0]
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


def test_nobody_waits_for_a_hash_that_none_wants_any_more(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    bench.join("a")
    hashes: list[float] = []

    def slowly(state: RunState) -> str:
        hashes.append(time.monotonic())
        time.sleep(0.1)
        return "0" * 64

    monkeypatch.setattr(RunState, "sha256", slowly)
    monkeypatch.setattr("topq_dist.ps.server.status._PAUSE_PER_HASH", 600)
    here = threading.Event()
    here.set()
    with ThreadPoolExecutor(6) as pool:
        hash_of = partial(bench.server.status, state_sha256=True)
        assert pool.submit(hash_of).result(10).state_sha256  # the next turn is far
        calls = [pool.submit(hash_of, is_active=here.is_set) for _ in range(4)]
        stays = pool.submit(hash_of)
        here.clear()
        for call in calls:
            with pytest.raises(NotReadyError, match="gone before"):
                call.result(10)
        assert len(hashes) == 1
        bench.server.drain()
        with pytest.raises(NotReadyError, match="shutting down"):
            stays.result(10)
    assert len(hashes) == 1


def test_to_wake_lets_all_who_wait_look_again() -> None:
    waiters = Waiters()
    turns = [waiters.add() for _ in range(4)]
    for turn in turns:
        turn.acquire()
    with ThreadPoolExecutor(4) as pool:
        waits = [pool.submit(turn.acquire, timeout=30.0) for turn in turns]
        time.sleep(0.05)
        assert not any(wait.done() for wait in waits)
        waiters.wake()
        waiters.wake()
        assert all(wait.result(10) for wait in waits)
    for turn in turns[1:]:
        waiters.drop(turn)
    waiters.wake()
    assert turns[0].acquire(timeout=0)  # woken between its look and its wait
    assert not turns[0].acquire(timeout=0.01)  # and not twice
    assert not turns[1].acquire(timeout=0)  # nor is who has gone


def test_nobody_misses_what_several_threads_wake_for() -> None:
    waiters, last, threads = Waiters(), 3000, 3
    said = [0] * threads

    def say(place: int) -> None:
        for number in range(1, last + 1):
            said[place] = number
            waiters.wake()

    def listen() -> None:
        turn = waiters.add()
        while True:
            turn.acquire(blocking=False)
            if min(said) == last:
                break
            assert turn.acquire(timeout=20.0), said
        waiters.drop(turn)

    with ThreadPoolExecutor(2 * threads) as pool:
        work = [pool.submit(listen) for _ in range(threads)]
        work += [pool.submit(say, place) for place in range(threads)]
        for one in work:
            one.result(60)


def test_a_push_that_waits_for_long_gathers_nothing(make: Make) -> None:
    bench = make({"options": {"lr": 1.0}}, start_workers=2)
    a, _ = bench.join("a"), bench.join("b")
    pending = bench.submit(push_of(a, 1, START))
    for _ in range(20):
        assert bench.server.wait(pending, 0.001) == ("b",)
    assert pending.waiters._locks == []
