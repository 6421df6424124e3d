"""exchange="auto" with frames on the device, Triton interpreted: what it tries is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ddp.test_hook_on_device import ON_DEVICE, engine, fails, heard, step, wrapped
from interpreted import DEVICE
from ranks import run_ranks
from torch import Tensor

from topq_dist import TopQState, register_topq_hook
from topq_dist.exchange import auto
from topq_dist.exchange.allgather import AllGather
from topq_dist.exchange.device_gather import DeviceAllGather

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(600)]


def trained(rank: int, setting: str, chosen: str, steps: int) -> tuple[list[Tensor], TopQState]:
    """Return the parameters after each step of a run in which "auto" chooses soon, and this."""
    # in a process of its own
    vars(auto)["_cheapest"] = lambda costs: chosen
    auto.Auto._is_decided = lambda self, trial: True  # type: ignore[method-assign]
    with engine(setting):
        model = wrapped()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        state = register_topq_hook(model, optimizer, q=0.9, exchange="auto")
        seen = []
        for number in range(steps):
            step(model, rank, number)
            optimizer.step()
            seen.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).cpu())
    return seen, state


def exchanges(state: TopQState) -> dict[str, Any]:
    assert state._ranks is not None
    exchange = state._ranks.exchange
    assert isinstance(exchange, auto.Auto)
    return exchange._exchanges


def same_steps(rank: int, chosen: str, steps: int) -> bool:
    on_cpu, through_host = trained(rank, "0", chosen, steps)
    on_device, state = trained(rank, ON_DEVICE, chosen, steps)
    assert state.chosen_exchange == through_host.chosen_exchange == chosen
    if DEVICE == "cpu":
        assert isinstance(exchanges(through_host)["allgather"], AllGather)
    assert isinstance(exchanges(state)["allgather"], DeviceAllGather)
    for at, (mine, wanted) in enumerate(zip(on_device, on_cpu, strict=True)):
        assert torch.equal(mine, wanted), at
    residuals = state.state_dict()["residuals"]
    assert bool(residuals) == (chosen != "dense")
    for name, residual in through_host.state_dict()["residuals"].items():
        assert torch.equal(residuals[name].cpu(), residual.cpu()), name
    # what it has chosen is taken up by who goes on from here
    with engine(ON_DEVICE):
        model = wrapped()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        resumed = register_topq_hook(model, optimizer, q=0.9, exchange="auto")
        resumed.load_state_dict(through_host.state_dict())
        step(model, rank, 0)
        assert resumed.chosen_exchange == chosen
    return True


@pytest.mark.parametrize(
    ("ranks", "chosen", "steps"), [(2, "allgather", 13), (2, "dense", 10), (3, "split", 15)]
)
def test_what_is_chosen_has_the_bits_of_the_cpu(
    ranks: int, chosen: str, steps: int, tmp_path: Path
) -> None:
    assert run_ranks(ranks, same_steps, tmp_path, chosen, steps) == [True] * ranks


def failing(rank: int) -> str:
    """Return what a rank hears where rank 1 fails in a rehearsal."""
    with engine(ON_DEVICE):
        model = wrapped()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        state = register_topq_hook(model, optimizer, q=0.9, exchange="auto")
        for number in range(2):
            step(model, rank, number)
        assert state._ranks is not None
        trial = state._ranks.exchange
        assert isinstance(trial, auto.Auto)
        assert isinstance(trial._current, DeviceAllGather)
        if rank == 1:
            trial.compressor.compress = fails  # type: ignore[method-assign]
        return heard(model, rank)


def test_a_rank_that_fails_in_a_rehearsal_is_heard_of(tmp_path: Path) -> None:
    first, second = run_ranks(2, failing, tmp_path)
    assert first.startswith("0 rank 1 could not compress its gradient")
    assert second == "0 no memory left on the device"
