"""While exchange="auto" measures, training is what exchange="dense" makes it, to the bit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hook_cases import loss_of, small_model
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import topq_dist.exchange.auto
from topq_dist import TopQGradientOptimizer, TopQState, register_topq_hook

pytestmark = pytest.mark.gloo

Make = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "paired": lambda p: TopQGradientOptimizer(
        p, torch.optim.Adam, q=0.9, dq=0.05, param_ndim=None, lr=1e-2
    ),
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": "corrected", "clip_norm": 0.1}),
    ("AdamW", {}),
    ("AdamW", {"momentum": "adam"}),
    ("paired", {}),
]


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def hooked(make: Make, **options: Any) -> tuple[DistributedDataParallel, Optimizer, TopQState]:
    torch.manual_seed(11)
    model = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
    optimizer = make(model.parameters())
    return model, optimizer, register_topq_hook(model, optimizer, **options)


def step_of(model: nn.Module, optimizer: Optimizer, step: int, rank: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def measured(rank: int) -> list[list[str]]:
    """Return what was said of each case: a run that ends on dense never leaves dense's path."""
    topq_dist.exchange.auto._cheapest = lambda costs: "dense"
    logger = logging.getLogger("topq_dist")
    logger.setLevel(logging.INFO)
    said = []
    for name, options in CASES:
        records = Records()
        logger.addHandler(records)
        model, optimizer, state = hooked(OPTIMIZERS[name], **options)
        other, reference, _ = hooked(OPTIMIZERS[name], exchange="dense", **options)
        steps = 0
        for steps in range(50):
            draws = torch.get_rng_state()
            step_of(model, optimizer, steps, rank)
            torch.set_rng_state(draws)
            step_of(other, reference, steps, rank)
            assert same(model, other), (name, options, steps)
            if state.chosen_exchange is None:
                assert state.state_dict()["residuals"] == {}
        assert state.chosen_exchange == "dense"
        logger.removeHandler(records)
        said.append(records.said)
    return said


def test_a_run_that_ends_on_dense_is_dense_from_the_first_step(tmp_path: Path) -> None:
    ranks = run_ranks(4, measured, tmp_path)
    for said in ranks[0]:
        (line,) = said
        assert line.startswith("exchange dense chosen, ")
        for name in ("allgather", "split", "dense"):
            assert f"{name} " in line
        assert "ms a step" in line
    assert all(said == [] for rank in ranks[1:] for said in rank)


def sparse_afterwards(rank: int) -> bool:
    """Nothing is left of what measuring has tried: after it a run is one that begins there."""
    topq_dist.exchange.auto._cheapest = lambda costs: "allgather"
    model, optimizer, state = hooked(OPTIMIZERS["SGD"], value_format=None)
    step = 0
    while state.chosen_exchange is None:
        assert state.state_dict()["residuals"] == {}
        step_of(model, optimizer, step, rank)
        step += 1
    # the step in which it was decided was sparse
    assert state.state_dict()["residuals"]
    flags = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(flags, torch.tensor([float(step)]))
    return all(float(flag) == step for flag in flags)


def overflowing(rank: int) -> bool:
    """An overflow while a sparse exchange is tried shows in the gradient as in dense's."""
    model, optimizer, _ = hooked(OPTIMIZERS["SGD"])
    other, reference, _ = hooked(OPTIMIZERS["SGD"], exchange="dense")
    for step in range(8):
        for net, inner in ((model, optimizer), (other, reference)):
            inner.zero_grad()
            loss = loss_of(net, step, rank)
            overflowed = loss * (torch.inf if step == 5 and rank == 1 else 1.0)
            overflowed.backward()  # type: ignore[no-untyped-call]
            if step != 5:
                inner.step()
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert one.grad is not None
            assert two.grad is not None
            assert torch.equal(one.grad.isnan(), two.grad.isnan())
        assert same(model, other)
    return True


def both(rank: int) -> bool:
    return sparse_afterwards(rank) and overflowing(rank)


def test_what_was_tried_leaves_nothing_behind(tmp_path: Path) -> None:
    assert run_ranks(2, both, tmp_path) == [True, True]
