"""Metrics of ranks with the hook, as each serves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from http_get import got
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile

from topq_dist import register_topq_hook
from topq_dist.telemetry import serve_metrics

STEPS = 12


def _numbers(address: tuple[str, int]) -> dict[str, float]:
    host, port = address
    lines = got(f"http://{host}:{port}/metrics").splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


def _served(rank: int, exchange: str) -> dict[str, float]:
    torch.manual_seed(1)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = register_topq_hook(model, optimizer, exchange=exchange)  # type: ignore[call-overload]
    names: set[str] = set()
    with serve_metrics(state) as server:
        assert "topq_residual_ratio" not in _numbers(server.address)
        for step in range(STEPS):
            optimizer.zero_grad()
            data = torch.randn(4, 64, generator=torch.Generator().manual_seed(10 * step + rank))
            loss = model(data).square().mean()
            if step == 5 and rank == 1:
                loss = loss * float("inf")
            if step == 7:
                with profile() as profiled:
                    loss.backward()
                names = {event.key for event in profiled.key_averages()}
            else:
                loss.backward()
            if step != 5:
                optimizer.step()
        numbers = _numbers(server.address)
    assert {
        "topq: select and encode",
        "topq: wait and decode",
        "topq: average and update residuals",
    } <= names
    stats = state.stats()
    assert numbers["topq_sent_bytes_total"] == stats.sent_bytes > 0
    assert numbers["topq_dense_bytes_total"] == stats.dense_bytes
    assert numbers["topq_wait_seconds_total"] == pytest.approx(stats.wait_s)
    parts_s = numbers["topq_select_seconds_total"] + numbers["topq_encode_seconds_total"]
    assert parts_s == pytest.approx(stats.select_s)
    return {name.replace('"', ""): value for name, value in numbers.items()}


@pytest.mark.gloo
@pytest.mark.parametrize("exchange", ["allgather", "split"])
def test_each_rank_serves_its_own(exchange: str, tmp_path: Path) -> None:
    for numbers in run_ranks(2, _served, tmp_path, exchange):
        assert numbers["topq_steps_total"] == STEPS
        assert numbers["topq_void_steps_total"] == 1
        assert numbers[f"topq_exchange_info{{exchange={exchange}}}"] == 1
        assert numbers["topq_residual_ratio"] > 0.1
        assert numbers["topq_residual_growing_steps"] == 0
        assert 1 <= numbers["topq_oldest_unsent_steps"] < STEPS
        for part in ("select", "encode", "wait", "decode"):
            assert 0 < numbers[f"topq_{part}_seconds_total"] < 10
