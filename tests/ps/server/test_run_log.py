"""The log lines of a run, on a clock that the test moves."""

from __future__ import annotations

import logging

import pytest
from ps.bench import Bench, Make, push_of

from topq_dist.ps.protocol.types import START
from topq_dist.ps.server.run_log import RunLog

LOGGER = "topq_dist.ps.server.run_log"


def told(
    caplog: pytest.LogCaptureFixture, log: RunLog, bench: Bench, seconds: int = 1
) -> list[str]:
    """Return what is told while these seconds pass."""
    caplog.clear()
    for _ in range(seconds):
        bench.clock.pass_s(1.0)
        log.look()
    return [one.getMessage() for one in caplog.records if one.name == LOGGER]


def test_a_run_is_told_of_as_it_goes(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench = make(lease_s=30.0)
    log = RunLog(bench.server, clock=bench.clock)
    assert told(caplog, log, bench, 20) == []  # nothing happens
    a, b = bench.join("a"), bench.join("b")
    for sequence in (1, 2, 3):
        bench.round(sequence, a, b)
    assert told(caplog, log, bench, 9) == []
    assert told(caplog, log, bench, 1) == [
        "version 3, durable 0, 0.30 a second, 2 workers, refused: nothing"
    ]
    pending = bench.submit(push_of(a, 4, bench.point))
    assert told(caplog, log, bench, 4) == []
    assert told(caplog, log, bench, 2) == [
        "version 4 has waited for 5 s: 1 of 2 pushes are there, missing: b"
    ]
    (line,) = caplog.records
    assert vars(line)["missing"] == ["b"]
    assert told(caplog, log, bench, 2) == []  # once
    bench.look(pending)  # a is heard of
    bench.clock.pass_s(11.0)
    assert told(caplog, log, bench) == [
        "worker b was not heard of for a lease: the run goes on without it"
    ]
    bench.answer(pending)
    assert told(caplog, log, bench)[0] == "version 4 is there after 21 s"


def test_nothing_is_read_where_nobody_listens(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    bench = make()
    log = RunLog(bench.server, clock=bench.clock)
    a = bench.join("a")
    bench.round(1, a)
    bench.submit(push_of(a, 2, bench.point))
    assert told(caplog, log, bench, 30) == []
    assert bench.point != START
