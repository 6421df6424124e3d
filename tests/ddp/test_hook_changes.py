"""Changes behind the hook's back: frozen parameters, groups that lose one, odd states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hook_cases import loss_of, small_model
from ranks import error_of, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import TopQGradientOptimizer, TopQState, register_topq_hook

pytestmark = pytest.mark.gloo


def backward(model: nn.Module, step: int, rank: int) -> None:
    model.zero_grad()
    loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]


def paired(
    **options: Any,
) -> tuple[DistributedDataParallel, TopQGradientOptimizer, TopQState]:
    model = DistributedDataParallel(small_model())
    optimizer = TopQGradientOptimizer(
        model.parameters(), q=0.5, dq=0.1, param_ndim=None, lr=0.1, **options
    )
    return model, optimizer, register_topq_hook(model, optimizer)


def frozen_between(rank: int, *, with_optimizer: bool) -> bool:
    model = DistributedDataParallel(small_model(), find_unused_parameters=True)
    frozen = model.module[2].weight
    frozen.requires_grad_(False)
    before = frozen.clone()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = TopQGradientOptimizer(trainable, q=0.5, param_ndim=None, lr=0.1)
    if with_optimizer:
        register_topq_hook(model, optimizer)
    else:
        register_topq_hook(model, q=0.5)
    for step in range(3):
        backward(model, step, rank)
        optimizer.step()
    others = all(p.grad is not None and bool(p.grad.any()) for p in trainable)
    return others and torch.equal(before, frozen)


def loaded_by_one(rank: int, *, steps_before: int) -> str:
    def hook() -> tuple[DistributedDataParallel, TopQState]:
        model = DistributedDataParallel(small_model())
        return model, register_topq_hook(model, q=0.9)

    model, state = hook()
    saved = state.state_dict() | {"chosen_exchange": "dense"}
    for step in range(steps_before):
        backward(model, step, rank)
    if rank == 1:
        state.load_state_dict(saved)
        assert state.chosen_exchange == "dense"
    return error_of(lambda: backward(model, steps_before, rank))


def loaded_by_all(rank: int) -> str | None:
    model = DistributedDataParallel(small_model())
    state = register_topq_hook(model, q=0.9)
    for step in range(3):
        backward(model, step, rank)
    state.load_state_dict(state.state_dict() | {"chosen_exchange": "dense"})
    for step in range(3):
        backward(model, step, rank)
        before = state.stats()
    backward(model, 3, rank)
    sent_bytes = state.stats().sent_bytes - before.sent_bytes
    assert sent_bytes >= state.stats().dense_bytes - before.dense_bytes
    return state.chosen_exchange


def changes(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {
        f"frozen, optimizer={flag}": frozen_between(rank, with_optimizer=flag)
        for flag in (False, True)
    }
    results["loaded at once"] = loaded_by_one(rank, steps_before=0)
    results["loaded later"] = loaded_by_one(rank, steps_before=2)
    results["loaded by all"] = loaded_by_all(rank)
    model, optimizer, state = paired()
    saved = state.state_dict()
    rubbish = saved | {"density": {"generator": torch.zeros(3, dtype=torch.uint8)}}
    results["rubbish"] = error_of(lambda: state.load_state_dict(rubbish))
    backward(model, 0, rank)
    del optimizer.param_groups[0]["params"][1]
    results["lost"] = error_of(lambda: backward(model, 1, rank))
    wrong: Any = "no"
    results["feedback"] = error_of(
        lambda: register_topq_hook(
            DistributedDataParallel(small_model()), q=0.5, error_feedback=wrong
        )
    )
    return results


def test_every_rank_says_what_is_wrong_or_goes_on(tmp_path: Path) -> None:
    for result in run_ranks(2, changes, tmp_path):
        assert result["frozen, optimizer=False"]
        assert result["frozen, optimizer=True"]
        for case in ("loaded at once", "loaded later"):
            for part in ("ExchangeError", "exchange=None", "exchange=dense"):
                assert part in result[case], result[case]
        assert result["loaded by all"] == "dense"
        assert result["rubbish"].startswith("ValueError: state has a generator state")
        assert "ValueError" in result["lost"]
        assert "0.bias" in result["lost"]
        assert "TypeError: error_feedback='no'" in result["feedback"]
