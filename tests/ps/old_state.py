"""A run of two workers whose numbers are the same everywhere: it made tests/data/old_state.

The gradients are small fractions made of whole numbers, so that no matrix product and no random
numbers of some release come into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ps.workers import side_by_side
from torch import Tensor, nn

from topq_dist.ps import ParameterServerOptimizer

WORKERS = ("w0", "w1")
TRAINING: dict[str, Any] = {
    "inner_opt": "adamw",
    "options": {"lr": 0.01, "weight_decay": 0.1},
    "downlink": "topq",
    "q": 0.8,
    "value_format": "fp16",
}
SERVING: dict[str, Any] = {"start_workers": 2, "max_workers": 2, "snapshot_every": 10**9}
# the server's snapshot is of version 1, the workers' states of version 3: two replays each
SNAPSHOT_STEP, CHECKPOINT_STEP, LAST_STEP = 1, 3, 6


class Model(nn.Module):
    """Two dtypes, and so two vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(_fractions(16 * 12, 1).view(16, 12))
        self.bias = nn.Parameter(_fractions(12, 2))
        self.narrow = nn.Parameter(_fractions(64, 3).bfloat16())


def _fractions(numel: int, seed: int) -> Tensor:
    return ((torch.arange(numel) * 37 + seed * 101) % 64 - 31).float() / 64


def connect(
    model: Model, worker: str, address: str, *, value_format: str = "fp16"
) -> ParameterServerOptimizer:
    return ParameterServerOptimizer(
        model.named_parameters(),
        address,
        q=0.75,
        worker=worker,
        value_format=value_format,
        timeout_s=30,
        # as it was before there was a choice
        keep_rate=False,
    )


def take_steps(
    models: Mapping[str, Model], optimizers: Mapping[str, ParameterServerOptimizer], steps: range
) -> None:
    """Have both workers take these steps side by side."""

    def work(place: int) -> None:
        worker = WORKERS[place]
        for step in steps:
            for number, parameter in enumerate(models[worker].parameters()):
                slopes = _fractions(parameter.numel(), 7 * step + 3 * number + place)
                parameter.grad = slopes.view(parameter.shape).to(parameter.dtype)
            for group in optimizers[worker].param_groups:
                group["lr"] = 0.01 / (1 + step)
            optimizers[worker].step()

    side_by_side(len(WORKERS), work)
