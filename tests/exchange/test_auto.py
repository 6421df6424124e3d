"""How "auto" decides, on a clock of our own, and that what it tries never counts."""

from __future__ import annotations

import logging
import math
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.compress.coherence import NO_COHERENCE
from topq_dist.compress.layout import Layout
from topq_dist.exchange.auto import Auto
from topq_dist.exchange.base import Exchange, Outgoing
from topq_dist.exchange.collectives import CommContext
from topq_dist.telemetry import Meter

LAYOUT = Layout(names=("w",), shapes=((3,),))


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0


class CostingWork:
    """Takes its time, and leaves its mark in the bucket; the dense one a doubled gradient."""

    coherence = NO_COHERENCE

    def __init__(self, bucket: Tensor, of: Costing) -> None:
        self._bucket, self._of = bucket, of

    def advance(self) -> None:
        pass

    def receive(self) -> bool:
        self._of.clock.now_s += self._of.step_s
        self._of.meter.add(wire_bytes=self._of.wire_bytes)
        return True

    def exceeds(self, limit: float) -> bool:
        return False

    def deliver(self) -> None:
        self._bucket.mul_(math.nan if self._of.sparse else 2.0)


class Costing(Exchange):
    def __init__(self, step_s: float, wire_bytes: int, *, dense: bool = False) -> None:
        self.step_s, self.wire_bytes, self.sparse = step_s, wire_bytes, not dense
        self.steps = 0
        self.clock, self.meter = Clock(), Meter()

    def begin_step(self) -> None:
        self.steps += 1

    def launch(self, outgoing: Outgoing) -> CostingWork:
        return CostingWork(outgoing.bucket, self)


def decided(
    exchanges: dict[str, Costing], group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> Auto:
    clock, meter = Clock(), Meter()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now_s)
    for exchange in exchanges.values():
        exchange.clock, exchange.meter = clock, meter
    context = CommContext(group=group, device=torch.device("cpu"), meter=meter)
    real = {name: Costing(1.0, 1, dense=name == "dense") for name in exchanges}
    deciding = Auto(context, real, exchanges)
    for _ in range(200):
        deciding.begin_step()
        if deciding.chosen is not None:
            break
        assert not deciding.sparse
        bucket = torch.ones(3)
        work = deciding.launch(Outgoing(bucket, LAYOUT, None, settings_digest=0))
        work.advance()
        assert work.receive()
        work.deliver()
        assert bucket.tolist() == [2.0, 2.0, 2.0]
    return deciding


def costing(allgather_s: float, split_s: float, dense_s: float) -> dict[str, Costing]:
    return {
        "allgather": Costing(allgather_s, 900),
        "split": Costing(split_s, 300),
        "dense": Costing(dense_s, 100, dense=True),
    }


def test_the_shortest_step_wins(alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    for fastest in ("allgather", "split", "dense"):
        seconds = [0.1 if name == fastest else 0.15 for name in ("allgather", "split", "dense")]
        exchanges = costing(*seconds)
        assert decided(exchanges, alone, monkeypatch).chosen == fastest
        assert [exchange.steps for exchange in exchanges.values()] == [11, 10, 10]


@pytest.mark.parametrize(
    ("split_s", "dense_s", "expected"),
    [
        (0.120, 0.110, "split"),
        (0.130, 0.110, "allgather"),
        (0.120, 0.097, "split"),
        (0.130, 0.097, "allgather"),
        (0.120, 0.090, "dense"),
    ],
)
def test_bytes_decide_between_sparse_exchanges_of_like_times_and_time_alone_for_dense(
    split_s: float,
    dense_s: float,
    expected: str,
    alone: dist.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert decided(costing(0.100, split_s, dense_s), alone, monkeypatch).chosen == expected


def test_where_dense_is_hopeless_few_steps_bear_its_cost(
    alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanges = costing(0.1, 0.12, 5.0)
    assert decided(exchanges, alone, monkeypatch).chosen == "split"
    assert [exchange.steps for exchange in exchanges.values()] == [5, 4, 0]


def test_a_hopeless_trial_ends_early(
    alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanges = costing(0.1, 0.5, 0.15)
    assert decided(exchanges, alone, monkeypatch).chosen == "allgather"
    assert [exchange.steps for exchange in exchanges.values()] == [11, 4, 10]


def test_what_was_chosen_and_why_is_said_once_with_the_times(
    alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="topq_dist")
    decided(costing(0.1, 0.2, 0.05), alone, monkeypatch)
    decided(costing(0.1, 0.12, 5.0), alone, monkeypatch)
    dense, split = (record.getMessage() for record in caplog.records)
    assert dense == (
        "exchange dense chosen, over 5 % faster than every sparse one: "
        "allgather 100.0 ms a step, 0.0009 MB; split 200.0 ms a step, 0.0003 MB; "
        "dense 50.0 ms a step, 0.0001 MB"
    )
    assert split.startswith("exchange split chosen, of fewest bytes among the sparse ones")
    assert split.endswith(
        ": dense at least 5000.0 ms a step; allgather 100.0 ms a step, 0.0009 MB; "
        "split 120.0 ms a step, 0.0003 MB"
    )


def test_a_single_candidate_needs_no_trial(alone: dist.ProcessGroup) -> None:
    context = CommContext(group=alone, device=torch.device("cpu"), meter=Meter())
    only = {"allgather": Costing(1.0, 1)}
    assert Auto(context, only, {"allgather": Costing(1.0, 1)}).chosen == "allgather"
