"""The plain top-k hook that topq_dist is measured against must itself be right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness.baselines import PlainTopKState, plain_topk_hook
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

WORLD_SIZE = 2
STEPS = 3
NUMEL = 12
DENSITY = 0.25


def _averages(rank: int) -> list[torch.Tensor]:
    model = DistributedDataParallel(nn.Linear(NUMEL, 1, bias=False))
    model.register_comm_hook(PlainTopKState(density=DENSITY), plain_topk_hook)
    averages = []
    for gradient in _gradients(rank):
        model.zero_grad()
        torch.autograd.backward(model(gradient).sum())
        assert model.module.weight.grad is not None
        averages.append(model.module.weight.grad[0].clone())
    return averages


def _gradients(rank: int) -> torch.Tensor:
    """The gradient of a linear layer's output is its input."""
    return torch.randn(STEPS, NUMEL, generator=torch.Generator().manual_seed(rank))


@pytest.mark.gloo
def test_average_of_the_top_parts_with_error_feedback(tmp_path: Path) -> None:
    answers = run_ranks(WORLD_SIZE, _averages, tmp_path)
    residuals = torch.zeros(WORLD_SIZE, NUMEL)
    k = int(NUMEL * DENSITY)
    for step in range(STEPS):
        whole = residuals + torch.stack([_gradients(rank)[step] for rank in range(WORLD_SIZE)])
        top = torch.zeros_like(whole)
        indices = whole.abs().topk(k).indices
        top.scatter_(1, indices, whole.gather(1, indices))
        residuals = whole - top
        for answer in answers:
            torch.testing.assert_close(answer[step], top.mean(0))
    assert residuals.count_nonzero() == WORLD_SIZE * (NUMEL - k)
