"""Gradients of float16 with a loss scale: what the scale keeps from zero is sent or kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from topq_dist import register_topq_hook

EXCHANGES: tuple[dict[str, Any], ...] = (
    {"exchange": "allgather"},
    {"exchange": "split"},
    {"exchange": "hierarchical", "ranks_per_node": 2},
    {"exchange": "dense"},
)


class Scale(GradScaler):
    """A scale of one's own."""

    def __init__(self, scale: float) -> None:
        super().__init__("cpu")
        self.scale_now = scale

    def get_scale(self) -> float:
        return self.scale_now


def hooked(scaler: Scale, **knobs: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(64, 64, bias=False).half())
    return model, register_topq_hook(model, momentum="optimizer", grad_scaler=scaler, **knobs)


def gradient_of(model: nn.Module, gradient: Tensor, scale: float) -> Tensor:
    """Return what the hook makes of a gradient, without the scale."""
    model.zero_grad()
    outputs = model(torch.eye(64).half())
    (outputs.float() * (gradient.t() * scale)).sum().backward()
    (weight,) = model.parameters()
    assert weight.grad is not None
    return weight.grad.float() / scale


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("q", [0.0, 0.97])
@pytest.mark.parametrize("value_format", ["int2", "fp32", None])
@pytest.mark.parametrize("exchange", ["allgather", "split", "dense", "auto"])
def test_what_is_too_small_for_float16_without_the_scale_is_sent_or_kept(
    q: float, value_format: str | None, exchange: str
) -> None:
    scaler = Scale(2.0**16)
    model, state = hooked(scaler, q=q, value_format=value_format, exchange=exchange)
    sent, true = torch.zeros(64, 64), torch.zeros(64, 64)
    for step in range(6):
        # the smallest of float16 is 6e-8
        gradient = (torch.rand(64, 64, generator=torch.Generator().manual_seed(step)) + 0.5) * 1e-8
        sent += gradient_of(model, gradient, scaler.scale_now)
        true += gradient
    kept = sum(state.state_dict()["residuals"].values())
    torch.testing.assert_close((sent + kept).sum(), true.sum(), rtol=1e-3, atol=0.0)


def overflowing(rank: int, knobs: dict[str, Any]) -> list[Tensor]:
    """Return what waits before, and after, a step whose average overflows with the scale."""
    scaler = Scale(2.0**10)
    model, state = hooked(scaler, q=0.5, value_format="fp32", bound=None, **knobs)
    gradient = torch.rand(64, 64, generator=torch.Generator().manual_seed(rank)) + 40.0
    found = []
    # each fits float16 with the scale, and two of them, one of which has waited, do not
    for scale in (2.0**10, 2.0**10, 2.0**9):
        scaler.scale_now = scale
        found.append(gradient_of(model, gradient, scale))
        found.append(state.state_dict()["residuals"].get("weight", torch.zeros(64, 64)))
    return found


@pytest.mark.gloo
@pytest.mark.parametrize("knobs", EXCHANGES, ids=lambda knobs: str(knobs["exchange"]))
def test_an_average_that_overflows_with_the_scale_makes_a_void_step(
    knobs: dict[str, Any], tmp_path: Path
) -> None:
    ranks = run_ranks(2, overflowing, tmp_path, knobs)
    for first, second in zip(*(one[::2] for one in ranks), strict=True):
        torch.testing.assert_close(first, second, rtol=0.0, atol=0.0, equal_nan=True)
    if knobs["exchange"] == "dense":
        return
    for averaged, kept, void, still_kept, fits, _ in ranks:
        assert bool(averaged.isfinite().all())
        assert bool(void.isnan().all())
        assert torch.equal(kept, still_kept)
        assert bool(fits.isfinite().all())
