"""A loss scale that the hook was not told of is noticed, and warned of once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hook_cases import loss_of, small_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from topq_dist import register_topq_hook

pytestmark = pytest.mark.usefixtures("alone")


def hooked(given: bool = True, **options: Any) -> tuple[nn.Module, Optimizer]:
    asked: dict[str, Any] = {"exchange": "allgather", "momentum": "optimizer", "q": 0.9} | options
    model = DistributedDataParallel(small_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    register_topq_hook(model, optimizer if given else None, **asked)
    return model, optimizer


def said_by(train: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    return [str(one.message) for one in caught]


def by_a_scaler(model: nn.Module, optimizer: Optimizer, scaler: Any, *, clips: bool) -> None:
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step, 0)).backward()
        if clips:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_a_grad_scaler_in_use_is_named_once(given: bool, clips: bool) -> None:
    model, optimizer = hooked(given)
    scaler = torch.amp.GradScaler("cpu")
    (said,) = said_by(lambda: by_a_scaler(model, optimizer, scaler, clips=clips))
    assert "a GradScaler is in use" in said
    assert "grad_scaler=" in said


class WithOneMore(nn.Module):
    """A model with a parameter smaller than all others, whose gradient is zeros."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.inner, self.more = small_model(), nn.Parameter(torch.zeros(shape))

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.inner(inputs) + 0 * self.more.sum()


@pytest.mark.parametrize("shape", [(0, 3), (2,)])
def test_one_in_use_is_seen_where_the_smallest_parameter_shows_nothing(
    shape: tuple[int, ...],
) -> None:
    model = DistributedDataParallel(WithOneMore(*shape))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    register_topq_hook(model, optimizer, exchange="allgather")
    scaler = torch.amp.GradScaler("cpu")
    (said,) = said_by(lambda: by_a_scaler(model, optimizer, scaler, clips=False))
    assert "a GradScaler is in use" in said


def test_one_that_unscales_in_a_fused_kernel_as_well() -> None:
    model = DistributedDataParallel(small_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    register_topq_hook(model, optimizer, exchange="allgather")
    scaler = torch.amp.GradScaler("cpu")
    (said,) = said_by(lambda: by_a_scaler(model, optimizer, scaler, clips=False))
    assert "a GradScaler is in use" in said


def test_nothing_is_said_where_the_hook_knows_or_nothing_is_scaled() -> None:
    scaler = torch.amp.GradScaler("cpu")
    model, optimizer = hooked(grad_scaler=scaler)
    assert said_by(lambda: by_a_scaler(model, optimizer, scaler, clips=True)) == []
    off = torch.amp.GradScaler("cpu", enabled=False)
    model, optimizer = hooked()
    assert said_by(lambda: by_a_scaler(model, optimizer, off, clips=True)) == []
    # without residuals there is no unit
    for options in ({"exchange": "dense"}, {"error_feedback": False}):
        model, optimizer = hooked(**options)
        assert said_by(lambda m=model, o=optimizer: by_a_scaler(m, o, scaler, clips=False)) == []


def test_another_models_scaler_is_none_of_its() -> None:
    model, _ = hooked()
    loss_of(model, 0, 0).backward()  # type: ignore[no-untyped-call]
    other = small_model()
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    assert said_by(lambda: by_a_scaler(other, theirs, scaler, clips=False)) == []


def by_hand(model: nn.Module, optimizer: Optimizer, scales: list[float], clips: float) -> None:
    for step, scale in enumerate(scales):
        optimizer.zero_grad()
        (loss_of(model, step, 0) * scale).backward()  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(scale)
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), clips)
        optimizer.step()


def test_a_scale_of_ones_own_is_warned_of_when_it_changes_by_powers_of_two() -> None:
    model, optimizer = hooked()
    scales = [1024.0, 1024.0, 2048.0, 512.0]
    (said,) = said_by(lambda: by_hand(model, optimizer, scales, 0.0))
    assert "divided by 1024 and now by 2048" in said
    # a mean over as many accumulated steps, or a clipped gradient, is no change of unit
    for same, clips in (([4.0] * 5, 0.0), ([1.0] * 5, 0.01)):
        model, optimizer = hooked()
        assert said_by(lambda m=model, o=optimizer, s=same, c=clips: by_hand(m, o, s, c)) == []
