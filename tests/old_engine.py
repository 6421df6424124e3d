"""Runs whose numbers are the same everywhere: they made tests/data/old_engine.

The gradients are small fractions made of whole numbers, so that no matrix product and no random
numbers of some release come into it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from topq_dist import TopQGradientOptimizer, register_topq_hook

RANKS = 2
SAVED_AT, LAST_STEP = 4, 7


class Slopes(nn.Module):
    """A loss whose gradients are given: they do not depend on the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(_fractions(18 * 14, 1).view(18, 14))
        self.bias = nn.Parameter(_fractions(18, 2))

    def forward(self, seed: int) -> Tensor:
        terms = [
            (parameter * _fractions(parameter.numel(), seed + number).view_as(parameter)).sum()
            for number, parameter in enumerate(self.parameters())
        ]
        return torch.stack(terms).sum()


def _fractions(numel: int, seed: int) -> Tensor:
    # odd over a power of two, so that none of them is zero
    return (2 * ((torch.arange(numel) ** 2 * 37 + seed * 101) % 499) - 499).float() / 512


def take_hook_steps(rank: int, folder: Path, start: int, stop: int) -> dict[str, Any]:
    """Have one rank take these steps by all-gather, from what is saved for it if not the first.

    Returns what it has then: its model, and the states of its optimizer and its hook.
    """
    model = DistributedDataParallel(Slopes())
    optimizer = AdamW(model.parameters(), lr=0.01)
    # what "auto" was in its first steps, when the first of these were taken
    hook = register_topq_hook(model, optimizer, exchange="allgather")
    if start:
        saved = torch.load(folder / f"rank{rank}.pt", weights_only=True)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        hook.load_state_dict(saved["hook"])
    for step in range(start, stop):
        optimizer.zero_grad()
        model(11 * step + 5 * rank).backward()
        optimizer.step()
    return {
        "model": model.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "hook": hook.state_dict(),
    }


def take_optimizer_steps(saved: dict[str, Any] | None, start: int, stop: int) -> dict[str, Any]:
    """Take these steps of a TopQGradientOptimizer in one process, from a state where there is one.

    Returns what it has then: its model, and the states of the optimizer and its generator.
    """
    model, generator = Slopes(), torch.Generator().manual_seed(3)
    optimizer = TopQGradientOptimizer(
        model.parameters(), InnerOpt=AdamW, q=0.8, dq=0.1, lr=0.01, generator=generator
    )
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
    for step in range(start, stop):
        optimizer.zero_grad()
        model(11 * step).backward()
        optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
    }
