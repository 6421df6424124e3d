"""Changes of the model behind the hook's back: ranks, what is frozen, what may go unused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hook_cases import loss_of, small_model
from ranks import error_of, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import TopQGradientOptimizer, register_topq_hook
from topq_dist.exchange.registry import ExchangeName

pytestmark = pytest.mark.gloo
EXCHANGES: tuple[ExchangeName, ...] = ("allgather", "split", "hierarchical", "dense", "auto")


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def parameters_of(model: nn.Module) -> Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters()])


def shrunk(rank: int) -> dict[str, float]:
    """Four ranks of which two go on, for each exchange; these hold the sum of their residuals."""
    models = {}
    for exchange in EXCHANGES:
        options: dict[str, Any] = {"ranks_per_node": 2} if exchange == "hierarchical" else {}
        model = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        state = register_topq_hook(model, optimizer, q=0.9, exchange=exchange, **options)
        for step in range(3):
            step_of(model, optimizer, step, rank)
        models[exchange] = model, optimizer, state
    small = dist.new_group([0, 1])
    if rank > 1:
        return {}
    ends: dict[str, float] = {}
    for exchange, (model, optimizer, state) in models.items():
        before = state.state_dict()["residuals"]
        model._update_process_group(small)  # type: ignore[no-untyped-call]
        for step in range(3, 6):
            step_of(model, optimizer, step, rank)
        after = state.state_dict()
        assert (after["world_size"], after["rank"]) == (2, rank)
        assert exchange == "auto" or before.keys() <= after["residuals"].keys()
        mine = parameters_of(model)
        other = mine.clone()
        dist.broadcast(other, 0, group=small)
        assert torch.equal(mine, other), exchange
        ends[exchange] = float(mine.norm())
    return ends


def test_the_hook_follows_a_group_that_has_shrunk(tmp_path: Path) -> None:
    ranks = run_ranks(4, shrunk, tmp_path)
    assert ranks[0] == ranks[1]
    assert set(ranks[0]) == set(EXCHANGES)


def strangers_meet(rank: int) -> str:
    """Two halves that have trained apart are put into one group."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = DistributedDataParallel(small_model(), process_group=halves[rank // 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = register_topq_hook(model, optimizer, exchange="allgather")
    for step in range(3):
        step_of(model, optimizer, step, rank)
    state.q = 0.9 if rank < 2 else 0.8
    assert dist.group.WORLD is not None
    model._update_process_group(dist.group.WORLD)  # type: ignore[no-untyped-call]
    return error_of(lambda: step_of(model, optimizer, 3, rank))


def test_ranks_that_meet_with_other_settings_all_say_so(tmp_path: Path) -> None:
    for said in run_ranks(4, strangers_meet, tmp_path):
        assert said.startswith("ExchangeError: ranks disagree"), said
        assert "q=0.9" in said
        assert "q=0.8" in said


def freed(rank: int) -> dict[str, Any]:
    """A layer that DDP knows is frozen at registration and freed later."""
    ends: dict[str, Any] = {}
    for kind in ("one q", "paired", "momentum"):
        model = DistributedDataParallel(small_model(), find_unused_parameters=True)
        first = model.module[0]
        first.requires_grad_(False)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if kind == "paired":
            optimizer = TopQGradientOptimizer(model.parameters(), q=0.5, param_ndim=None, lr=0.1)
        if kind == "momentum":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        asked: dict[str, Any] = {} if kind == "paired" else {"q": 0.8}
        given = None if kind == "one q" else optimizer
        state = register_topq_hook(model, given, exchange="allgather", **asked)
        before = first.weight.detach().clone()
        for step in range(3):
            step_of(model, optimizer, step, rank)
        assert torch.equal(before, first.weight)
        first.requires_grad_(True)
        for step in range(3, 6):
            step_of(model, optimizer, step, rank)
        assert not torch.equal(before, first.weight)
        assert "0.weight" in state.state_dict()["residuals"]
        if kind == "momentum":
            # taken out of its steps as of all others'
            assert optimizer.state[first.weight].get("momentum_buffer") is None
        ends[kind] = parameters_of(model)
    # one that its optimizer does not hold is named
    model = DistributedDataParallel(small_model(), find_unused_parameters=True)
    model.module[0].requires_grad_(False)
    held = [one for one in model.parameters() if one.requires_grad]
    optimizer = TopQGradientOptimizer(held, q=0.5, param_ndim=None, lr=0.1)
    register_topq_hook(model, optimizer, exchange="allgather")
    step_of(model, optimizer, 0, rank)
    model.module[0].requires_grad_(True)
    ends["not held"] = error_of(lambda: step_of(model, optimizer, 1, rank))
    return ends


def unknown_to_ddp(rank: int) -> dict[str, str]:
    """A layer frozen when DDP was made is freed on one rank or on both, or watched for ever."""
    said = {}
    for exchange in ("allgather", "dense", "auto"):
        for who in ("both", "one", "none"):
            module = small_model()
            module[0].requires_grad_(False)
            model = DistributedDataParallel(module)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            name: Any = exchange
            register_topq_hook(model, exchange=name, momentum="optimizer")
            step_of(model, optimizer, 0, rank)
            if who == "both" or (who == "one" and rank == 1):
                module[0].requires_grad_(True)
            said[f"{exchange} {who}"] = error_of(
                lambda model=model, optimizer=optimizer: step_of(model, optimizer, 1, rank)  # type: ignore[misc]
            )
    return said


def unused_later(rank: int) -> dict[str, str]:
    """find_unused_parameters is set after the hook was made."""
    said = {}
    model = DistributedDataParallel(small_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = register_topq_hook(model, exchange="allgather", momentum="optimizer")
    step_of(model, optimizer, 0, rank)
    model.find_unused_parameters = True
    before = state.state_dict()["residuals"]["4.bias"]
    optimizer.zero_grad()
    # what nobody uses keeps its residual
    model.module[:4](torch.ones(2, 13))
    hidden = model.module[4]
    model.module[4] = nn.Identity()
    model(torch.ones(2, 13)).sum().backward()
    model.module[4] = hidden
    assert torch.equal(before, state.state_dict()["residuals"]["4.bias"])
    model = DistributedDataParallel(small_model())
    register_topq_hook(model, exchange="allgather", momentum="optimizer", scope="bucket")
    step_of(model, optimizer, 0, rank)
    model.find_unused_parameters = True
    said["bucket"] = error_of(lambda: step_of(model, optimizer, 1, rank))
    lone = DistributedDataParallel(small_model())
    register_topq_hook(lone, exchange="allgather", momentum="optimizer")
    step_of(lone, optimizer, 0, rank)
    lone.find_unused_parameters = rank == 1
    said["one rank's"] = error_of(lambda: step_of(lone, optimizer, 1, rank))
    return said


def changed(rank: int) -> dict[str, Any]:
    return freed(rank) | unknown_to_ddp(rank) | unused_later(rank)


def test_what_is_frozen_freed_or_unused_is_followed_or_refused_on_every_rank(
    tmp_path: Path,
) -> None:
    ranks = run_ranks(2, changed, tmp_path)
    for kind in ("one q", "paired", "momentum"):
        assert torch.equal(ranks[0][kind], ranks[1][kind]), kind
    for rank, said in enumerate(ranks):
        assert "ValueError: optimizer holds no group with 0.weight" in said["not held"]
        assert "scope='bucket'" in said["bucket"]
        assert "ranks disagree" in said["one rank's"]
        assert "may_be_unused=True" in said["one rank's"]
        for exchange in ("allgather", "dense", "auto"):
            both, one = said[f"{exchange} both"], said[f"{exchange} one"]
            assert both.startswith("ValueError: 0.weight, 0.bias was frozen when"), both
            assert "make DistributedDataParallel and the hook anew" in both
            assert one.startswith("ValueError: 0.weight" if rank else "ExchangeError: rank 1"), one
            assert said[f"{exchange} none"] == "no error"
