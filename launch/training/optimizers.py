"""The optimizers of torch.optim by name: those that a plain training loop can use."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from training.options import Training

# a closure, sparse gradients, matrices only: not what a plain loop over any model has to offer
_UNFIT = {"LBFGS", "SparseAdam", "Muon"}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name.lower(): candidate
    for name, candidate in sorted(vars(torch.optim).items(), key=lambda item: item[0].lower())
    if isinstance(candidate, type)
    and issubclass(candidate, torch.optim.Optimizer)
    and candidate is not torch.optim.Optimizer
    and name not in _UNFIT
}


def default_lr(name: str) -> float:
    """Return torch's own default learning rate of OPTIMIZERS[name]."""
    return float(inspect.signature(OPTIMIZERS[name]).parameters["lr"].default)


def set_lr(optimizer: torch.optim.Optimizer, training: Training, step: int) -> None:
    """Give all parameter groups the learning rate of `step`, where the schedule changes it."""
    if training.lr_schedule != "constant":
        for group in optimizer.param_groups:
            group["lr"] = training.lr_at(step)
