"""Models, optimizers and hooks for the tests of the hook's momentum, and steps of them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from hook_cases import loss_of, small_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from topq_dist import TopQState, register_topq_hook
from topq_dist.hook.momentum import MomentumName

Q = 0.9
STEPS = 6
METHODS: tuple[MomentumName, ...] = ("feedback", "corrected", "adam", "optimizer")
PLAINLY: dict[str, Any] = {
    "q": Q,
    "exchange": "allgather",
    "value_format": None,
    "bound": None,
    "keep_rate": False,
    "adapt_rate": False,
}
Make = Callable[[Any], Optimizer]


def sgd(parameters: Any, **options: Any) -> Optimizer:
    return SGD(parameters, **({"lr": 0.1, "momentum": 0.75} | options))


def adamw(parameters: Any, **options: Any) -> Optimizer:
    return AdamW(parameters, **({"lr": 0.01, "weight_decay": 0.1} | options))


def hooked(make: Make, **options: Any) -> tuple[DistributedDataParallel, Optimizer, TopQState]:
    """Return a model of several buckets, optimizer and hook; q, fp32, no bound, all-gather."""
    model = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
    optimizer = make(model.parameters())
    options = PLAINLY | options
    with warnings.catch_warnings():
        if options.get("momentum") == "optimizer":
            warnings.simplefilter("ignore")
        return model, optimizer, register_topq_hook(model, optimizer, **options)


def step_of(model: nn.Module, optimizer: Optimizer, step: int, rank: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def train(model: nn.Module, optimizer: Optimizer, rank: int, *steps: int) -> None:
    for step in steps or range(STEPS):
        step_of(model, optimizer, step, rank)


def assert_same(one: nn.Module, other: nn.Module, what: str) -> None:
    for (name, left), right in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right), (what, name, (left - right).detach().abs().max())


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
