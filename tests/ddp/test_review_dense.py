"""Steps of whole gradients: alike on every rank, whichever has a residual, and paid in shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hook_cases import loss_of, small_model
from ranks import run_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from topq_dist import QSchedule, register_topq_hook

pytestmark = pytest.mark.gloo
OVERFLOWS_AT, STEPS = 2, 5


def overflowing(rank: int, loaded: str) -> dict[str, Any]:
    """Train with what a state has left, of which one rank has none, and overflow on the other."""
    model = DistributedDataParallel(small_model(), bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    q = QSchedule(start=0.5, end=0.9, steps=100)
    state = register_topq_hook(model, optimizer, q=q, exchange="dense")
    saved = {**state.state_dict(), "residuals": {}}
    if loaded != "none":
        generator = torch.Generator().manual_seed(rank)
        saved["residuals"] = {
            name: 1e-3 * torch.randn(one.shape, generator=generator)
            for name, one in model.module.named_parameters()
        }
    if loaded == "by more ranks":
        state.load_state_dict([{**saved, "world_size": 1, "rank": 0}])
    elif loaded == "own":
        if rank == 1:
            saved["residuals"] = {}
        state.load_state_dict(saved)
    marks: list[Tensor] = []
    first = next(model.module.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        overflow = step == OVERFLOWS_AT and rank == 0
        handle = first.register_hook(lambda g, by=torch.inf if overflow else 1.0: g * by)
        loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]
        handle.remove()
        grads = [one.grad for one in model.parameters() if one.grad is not None]
        marks.append(torch.cat([g.isfinite().flatten() for g in grads]))
        if step != OVERFLOWS_AT:
            optimizer.step()
    return {
        "finite": torch.stack(marks),
        "step": state.state_dict()["density"]["step"],
        "weights": torch.cat([one.detach().flatten() for one in model.parameters()]),
    }


def every_overflow(rank: int) -> dict[str, dict[str, Any]]:
    return {loaded: overflowing(rank, loaded) for loaded in ("none", "by more ranks", "own")}


def test_a_step_counts_alike_on_ranks_of_which_one_has_no_residual(tmp_path: Path) -> None:
    ranks = run_ranks(2, every_overflow, tmp_path)
    for loaded, mine in ranks[0].items():
        theirs = ranks[1][loaded]
        assert mine["step"] == theirs["step"], loaded
        assert torch.equal(mine["finite"], theirs["finite"]), loaded
        assert torch.equal(mine["weights"], theirs["weights"]), loaded
        overflowed = mine["finite"][OVERFLOWS_AT]
        # where nothing was loaded nothing waits anywhere, and overflow shows as without a hook
        assert bool(overflowed.any()) == (loaded == "none")
        assert mine["step"] == (STEPS if loaded == "none" else STEPS - 1)
