"""A worker says for whom it waits, or that its server is away: within seconds, and once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from ps.servers import serving
from ps.workers import backward, batch, make_model
from server_process import quiet_port

from topq_dist.ps import ParameterServerOptimizer, ServerLostError
from topq_dist.ps.client import wait_notice
from topq_dist.ps.client.wait_notice import WaitNotice

SGD = {"inner_opt": "sgd", "options": {"lr": 0.1}}


class Time:
    """Seconds that pass when the test says so."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def time() -> Time:
    return Time()


def told(caplog: pytest.LogCaptureFixture, notice: WaitNotice) -> list[str]:
    caplog.clear()
    notice._look()
    return [one.getMessage() for one in caplog.records]


def test_whom_it_waits_for_is_told_once_and_when_it_is_over(
    time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    notice = WaitNotice("h:1", "a", clock=time)
    with notice.waiting("push 7"):
        time.now_s += 5.0
        assert told(caplog, notice) == []
        notice.heard(("b", "c"))
        (line,) = caplog.records
        assert line.levelno == logging.WARNING
        assert line.getMessage() == (
            "worker a: push 7, 5 s so far: waits for b, c at parameter server h:1"
        )
        time.now_s += 60.0
        notice.heard(("b",))
        assert told(caplog, notice) == []
    assert caplog.records[-1].getMessage() == "worker a: push 7 is over after 65 s"
    with notice.waiting("push 8"):
        # as long as is usual here: nothing to tell
        time.now_s += 15.0
        notice.heard(("b",))
        assert told(caplog, notice) == []
        time.now_s += 10.0
        notice.heard(())
        assert (
            caplog.records[-1]
            .getMessage()
            .endswith("waits for others to join at parameter server h:1")
        )


def test_a_server_that_fails_or_is_silent_is_told_of(
    time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    notice = WaitNotice("h:1", "a", clock=time)
    with notice.waiting("push 1"):
        notice.failed(OSError("refused"))
        time.now_s += 2.5
        notice.failed(OSError("refused"))
        assert told(caplog, notice) == []
        time.now_s += 0.5
        assert told(caplog, notice) == [
            "worker a: push 1, 3 s so far: parameter server h:1 does not take it: refused"
        ]
        time.now_s += 9.0
        notice.failed(OSError("refused"))
        assert told(caplog, notice) == []
    with notice.waiting("push 2"):
        notice.failed(OSError("refused"))
        time.now_s += 5.0
        assert told(caplog, notice) == []  # what is tried now does not fail
        time.now_s += 4.0
        assert told(caplog, notice) == []
        time.now_s += 1.0
        assert told(caplog, notice) == [
            "worker a: push 2, 10 s so far: parameter server h:1 does not answer"
        ]
    assert told(caplog, notice) == []


def test_a_worker_whose_server_is_away_says_so(caplog: pytest.LogCaptureFixture) -> None:
    address = f"127.0.0.1:{quiet_port()}"
    with pytest.raises(ServerLostError):
        ParameterServerOptimizer(make_model().named_parameters(), address, worker="a", timeout_s=6)
    text = [one.getMessage() for one in caplog.records if one.name == wait_notice.__name__]
    assert len(text) == 1
    assert text[0].startswith("worker a: joining, ")
    assert f"parameter server {address} does not take it" in text[0]


def test_a_worker_that_waits_for_another_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path, SGD, start_workers=2, round_timeout_s=7.0) as server:
        model, other = make_model(), make_model()
        with (
            ParameterServerOptimizer(other.named_parameters(), str(server.address), worker="idle"),
            ParameterServerOptimizer(
                model.named_parameters(), str(server.address), worker="busy"
            ) as optimizer,
        ):
            backward(model, [batch(0, 0)])
            optimizer.step()
    text = [one.getMessage() for one in caplog.records if one.name == wait_notice.__name__]
    assert text == [
        f"worker busy: push 1, 5 s so far: waits for idle at parameter server {server.address}"
    ]
