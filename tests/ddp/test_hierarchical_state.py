"""A state is taken up by ranks that keep nothing: those that pass their gradients on in a node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ddp.momentum_hooks import METHODS, adamw, hooked, sgd, train
from ranks import run_ranks

pytestmark = pytest.mark.gloo


def taken_up(rank: int) -> bool:
    for method in METHODS:
        make = sgd if method == "corrected" else adamw
        knobs: dict[str, Any] = {"momentum": method, "adapt_rate": True}
        model, optimizer, state = hooked(make, **knobs)
        train(model, optimizer, rank)
        saved = [state.state_dict(all_ranks=True)]
        dist.broadcast_object_list(saved, src=0)
        knobs |= {"exchange": "hierarchical", "ranks_per_node": 2}
        other, reference, resumed = hooked(make, **knobs)
        resumed.load_state_dict(saved[0])
        alike = resumed.state_dict()["momentum"].get("coherence")
        assert alike == state.state_dict()["momentum"].get("coherence"), method
        # ranks that have taken up different things would disagree
        train(other, reference, rank)
    return True


def rates_kept(rank: int) -> dict[str, list[float]]:
    model, optimizer, state = hooked(
        adamw, keep_rate=True, exchange="hierarchical", ranks_per_node=2
    )
    train(model, optimizer, rank)
    for group in optimizer.param_groups:
        group["lr"] *= 0.75
    train(model, optimizer, rank)
    rates: dict[str, list[float]] = state.state_dict()["momentum"]["rates"]
    return rates


def test_those_who_pass_on_know_the_rates_as_well(tmp_path: Path) -> None:
    rates = run_ranks(4, rates_kept, tmp_path)
    assert rates == [rates[0]] * 4
    assert rates[0]
    for now, _, highest in rates[0].values():
        assert now == 0.75 * highest


def test_those_who_pass_on_take_up_what_all_have_alike(tmp_path: Path) -> None:
    assert run_ranks(4, taken_up, tmp_path) == [True] * 4
