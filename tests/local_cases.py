"""Runs of LocalTopQ for tests, and the same in one process with plain tensor operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hook_cases import keep_top, loss_of, small_model
from torch import Tensor, nn

from topq_dist import LocalTopQ
from topq_dist.sparsity import at_least_one

LR = 0.1


def inner_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def backward(model: nn.Module, step: int, rank: int) -> None:
    model.zero_grad()
    loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]


def local(seed: int, **options: Any) -> tuple[nn.Module, LocalTopQ]:
    """Return a model, other than other ranks', and its LocalTopQ."""
    model = small_model(seed=seed)
    return model, LocalTopQ(model, inner_optimizer(model), **options)


def train(model: nn.Module, steps: LocalTopQ, rank: int, first: int, last: int) -> None:
    """Take the inner steps from `first` up to `last`, which is left out."""
    for step in range(first, last):
        backward(model, step, rank)
        steps.step()


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class LocalReference:
    """The numbers of W ranks with LocalTopQ, values as they are: written anew, in one process.

    offsets: the step within `every` at which each parameter has its rounds, by name.
    """

    def __init__(
        self,
        world_size: int,
        *,
        every: int,
        q: float,
        decay: float,
        outer: Mapping[str, float | bool],
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        self.models = [small_model(seed=0) for _ in range(world_size)]
        self.inner = [inner_optimizer(model) for model in self.models]
        self.every, self.q, self.decay = every, q, decay
        self.offsets = offsets or {}
        names = [name for name, _ in self.models[0].named_parameters()]
        self.outer = {
            n: nn.Parameter(p.detach().clone())
            for n, p in zip(names, self.models[0].parameters(), strict=True)
        }
        self.outer_sgd = {n: torch.optim.SGD([p], **outer) for n, p in self.outer.items()}  # type: ignore[arg-type]
        self.residuals = [
            {n: torch.zeros_like(p) for n, p in self.outer.items()} for _ in self.models
        ]

    def step(self, step: int) -> None:
        for rank, (model, optimizer) in enumerate(zip(self.models, self.inner, strict=True)):
            backward(model, step, rank)
            optimizer.step()
        with torch.no_grad():
            for name, outer in self.outer.items():
                if (step + 1) % self.every == self.offsets.get(name, self.every) % self.every:
                    self._round(name, outer)

    def _round(self, name: str, outer: nn.Parameter) -> None:
        mean = torch.zeros_like(outer)
        for model, residuals in zip(self.models, self.residuals, strict=True):
            change = model.get_parameter(name) - outer
            change = self.decay * residuals[name] + change
            k = at_least_one(self.q, change.numel())
            sent = keep_top(change.view(1, -1), k).view_as(change)
            residuals[name] = change - sent
            mean += sent / len(self.models)
        outer.grad = -mean
        self.outer_sgd[name].step()
        for model in self.models:
            model.get_parameter(name).copy_(outer)
