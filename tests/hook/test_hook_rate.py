"""adapt_rate= of the hook: gradients that agree over steps raise the rate, on all ranks alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hook_cases import loss_of, small_model
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import ExchangeError, register_topq_hook
from topq_dist.hook.feedback_momentum import FeedbackMomentum
from topq_dist.optim.momentum_rules import MomentumSwitch

pytestmark = pytest.mark.gloo
STEPS = 12


def trained(rank: int, **options: Any) -> tuple[nn.Module, list[float]]:
    """Return a model that saw one batch a rank over and over, and the factor of each step."""
    model = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    state = register_topq_hook(model, optimizer, q=0.95, value_format="fp32", **options)
    factors = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, 0, rank).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        momentum = state._parts.stages.momentum
        assert isinstance(momentum, FeedbackMomentum)
        assert isinstance(momentum._switch, MomentumSwitch)
        factors.append(momentum._switch.rate_factor)
    return model, factors


def same_everywhere(rank: int) -> list[float]:
    factors_of: dict[str, list[float]] = {}
    exchanges: list[dict[str, Any]] = [
        {"exchange": "allgather"},
        {"exchange": "split"},
        {"exchange": "hierarchical", "ranks_per_node": 2},
    ]
    for options in exchanges:
        model, factors = trained(rank, **options)
        factors_of[options["exchange"]] = factors
        seen: list[list[float]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(seen, factors)
        assert all(other == factors for other in seen), (options, seen)
        mine = torch.cat([p.detach().flatten() for p in model.parameters()])
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mine, first)
    factors = factors_of["allgather"]
    # the first step has no residual yet
    assert factors[0] == 1.0
    assert factors[-1] > 1.5
    assert max(factors) <= (1 / 0.05) ** 0.5 + 1e-9
    return factors


def test_every_rank_has_the_same_factor_over_every_exchange(tmp_path: Path) -> None:
    assert len(set(map(tuple, run_ranks(4, same_everywhere, tmp_path)))) == 1


def switched_off(rank: int) -> bool:
    _, factors = trained(rank, exchange="allgather", adapt_rate=False)
    assert factors == [1.0] * STEPS
    model = DistributedDataParallel(small_model())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    # which goes along sums as they are
    state = register_topq_hook(model, sgd, q=0.95)
    for _ in range(3):
        loss_of(model, 0, rank).backward()  # type: ignore[no-untyped-call]
    assert state.state_dict()["momentum"]["coherence"] == [0.0, 0.0]
    with pytest.raises(TypeError, match="adapt_rate=1: expected True or False"):
        register_topq_hook(DistributedDataParallel(small_model()), adapt_rate=1)  # type: ignore[call-overload]
    plain = DistributedDataParallel(small_model())
    adam = torch.optim.Adam(plain.parameters())
    with pytest.raises(ExchangeError, match="adapt_rate=False"):
        register_topq_hook(plain, adam, adapt_rate=rank == 0)
    return True


def test_it_can_be_left_off_and_is_for_optimizers_that_do_not_divide(tmp_path: Path) -> None:
    assert run_ranks(2, switched_off, tmp_path) == [True, True]
