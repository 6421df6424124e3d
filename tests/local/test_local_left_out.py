"""Warnings of what a LocalTopQ does not exchange, the names that it has, what it counts."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
from local_cases import inner_optimizer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from topq_dist import LocalTopQ

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_trains_beside_the_exchange_is_named_once(
    alone: dist.ProcessGroup, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    optimizer = inner_optimizer(model)
    steps = LocalTopQ(model, optimizer, every=2, q=0.5, process_group=alone)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            steps.step()
        assert caplog.text == ""
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(7, 3))]})
        steps.step()
        assert caplog.text == ""
        for _ in range(5):
            steps.step()
    (said,) = [record.message for record in caplog.records]
    assert "0.weight, 0.bias" in said or "0.bias, 0.weight" in said
    assert "one of shape (7, 3)" in said
    assert "1.weight" not in said


def test_dense_bytes_are_of_the_parameters_own_dtype(alone: dist.ProcessGroup) -> None:
    model = nn.Linear(10, 10, bias=False).bfloat16()
    steps = LocalTopQ(model, inner_optimizer(model), every=2, q=0.5, process_group=alone)
    steps.step()
    assert steps.stats().dense_bytes == 200


def test_names_are_without_what_wraps_modules(alone: dist.ProcessGroup) -> None:
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 1)))
    steps = LocalTopQ(model, inner_optimizer(model), every=2, q=0.5, process_group=alone)
    assert set(steps.state_dict()["outer"]) == {"0.weight", "0.bias"}
