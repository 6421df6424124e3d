"""How "auto" decides, on a clock of our own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from topq_dist.exchange.auto import Auto
from topq_dist.exchange.base import Exchange, ExchangeWork
from topq_dist.exchange.collectives import CommContext
from topq_dist.telemetry import Meter


class Costing(Exchange):
    def __init__(self, step_s: float, wire_bytes: int) -> None:
        self.step_s, self.wire_bytes = step_s, wire_bytes
        self.steps = 0

    def launch(self, *_: Any, **__: Any) -> ExchangeWork:
        raise NotImplementedError


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def decided(
    exchanges: dict[str, Costing], group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> Auto:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = Meter()
    deciding = Auto(CommContext(group=group, device=torch.device("cpu"), meter=meter), exchanges)
    for _ in range(200):
        deciding.begin_step()
        if deciding.chosen is not None:
            break
        current: Any = deciding._exchange
        current.steps += 1
        clock[0] += current.step_s
        meter.add(wire_bytes=current.wire_bytes)
    return deciding


def test_the_shortest_step_wins(alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    for fastest in ("allgather", "split", "dense"):
        exchanges = {
            name: Costing(0.1 if name == fastest else 0.15, wire_bytes=100)
            for name in ("allgather", "split", "dense")
        }
        assert decided(exchanges, alone, monkeypatch).chosen == fastest
        assert [exchange.steps for exchange in exchanges.values()] == [24, 10, 10]


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
    exchanges = {
        "allgather": Costing(0.100, 900),
        "split": Costing(split_s, 300),
        "dense": Costing(dense_s, 100),
    }
    assert decided(exchanges, alone, monkeypatch).chosen == expected


def test_a_hopeless_trial_ends_early(
    alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanges = {"allgather": Costing(0.1, 10), "dense": Costing(5.0, 1000)}
    assert decided(exchanges, alone, monkeypatch).chosen == "allgather"
    assert exchanges["dense"].steps == 4


def test_a_single_candidate_needs_no_trial(alone: dist.ProcessGroup) -> None:
    link = CommContext(group=alone, device=torch.device("cpu"), meter=Meter())
    assert Auto(link, {"allgather": Costing(1.0, 1)}).chosen == "allgather"
