"""One layer, its batches, and steps of an optimizer that has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

STEPS = 4


def model_of(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(5, 4, bias=False)


def batch(step: int) -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(step))


def closure_of(model: nn.Module, optimizer: Optimizer, step: int) -> Callable[[], float]:
    def closure() -> float:
        optimizer.zero_grad()
        loss: Tensor = model(batch(step)).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    return closure


def values_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def moved(model: nn.Linear, optimizer: Optimizer) -> float:
    """Return how far a step goes along a gradient of ones."""
    model.weight.grad = torch.ones_like(model.weight)
    before = model.weight.detach().clone()
    optimizer.step()
    model.weight.grad = None
    steps = before - model.weight.detach()
    torch.testing.assert_close(steps, torch.full_like(steps, float(steps[0, 0])), atol=1e-6, rtol=0)
    return float(steps.mean())
