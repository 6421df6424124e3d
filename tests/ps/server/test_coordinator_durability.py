"""The coordinator and what must be on disk, or be there at all, before it answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ps.bench import SPEC, Make, push_of

from topq_dist.ps.protocol.errors import NotReadyError
from topq_dist.ps.protocol.types import START, Answer, Push
from topq_dist.ps.server.requests import JoinCall
from topq_dist.ps.state.snapshot_file import StateError


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
    assert bench.server.fetch(b, central=False)[0].point == START
    assert bench.server.status().durable_version == 0
    # the first comes back late: the model is there
    a = bench.server.join(call)
    assert not a.upload
    bench.server.upload(a.caller, [memoryview(b"x")])
    assert bytes(bench.server.fetch(b, central=True)[0].payloads[0]) == bytes(16)


def test_an_optimizer_that_raises_ends_everything(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(snapshot_every=1)
    a, b = bench.join("a"), bench.join("b")

    def fail(*_: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(bench.server._state.central, "apply", fail)  # type: ignore[union-attr]
    pending = bench.submit(push_of(a, 1, START))
    with pytest.raises(NotReadyError, match="started again"):
        bench.submit(push_of(b, 1, START))
    assert bench.server.failed
    with pytest.raises(NotReadyError):
        bench.look(pending)
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
    pending = bench.submit(push_of(a, 1, START))
    assert bench.server.wait(pending, 0.1) == ()
    assert bench.server.status().durable_version == 0
    gate.set()
    answer = bench.server.wait(pending, 10)
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


def test_who_waits_for_a_snapshot_is_sent_away_once_the_last_has_failed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    a = bench.join("a")
    bench.round(1, a)
    tried = threading.Event()

    def full_save(snapshot: Any) -> None:
        tried.set()
        raise StateError("no space left")

    monkeypatch.setattr(bench.state_dir, "save", full_save)
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(bench.server.leave, a)
        assert tried.wait(10)
        with pytest.raises(StateError, match="no space left"):
            bench.server.drain()
        with pytest.raises(NotReadyError, match="shutting down"):
            leaving.result(10)


def test_a_snapshot_of_each_version_does_not_grow_with_the_history(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("topq_dist.ps.state.run_state._HISTORY_BYTES", 5000)
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
    assert bench.server.fetch(bench.join("b"), central=False)[0].point == START
    bench.crash()
    assert bench.join("a", epoch=a.epoch, held=START).worker == "a"


def test_a_model_that_is_not_finite_is_never_saved(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make()  # the snapshots are those that are asked for
    a = bench.join("a")
    bench.round(1, a)
    bench.save()
    saved = bench.state_dir.snapshot_path.read_bytes()
    state = bench.server._started()
    pending = bench.submit(push_of(a, 2, bench.point))
    state.central._params.flats[0][1] = float("inf")
    bench.save()
    assert bench.server.failed
    assert "version 2 holds NaN or infinity and is not saved" in caplog.text
    with pytest.raises(NotReadyError, match="started again"):
        bench.look(pending)
    bench.server.drain()
    assert bench.state_dir.snapshot_path.read_bytes() == saved
