"""Beside the rest of torch.optim and torch.amp: inner optimizers, schedulers, closures, hooks."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from rai_oracle import OracleOptimizer, oracle_warnings_ignored
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from topq_dist.optim import TopQGradientOptimizer


def make_param() -> Tensor:
    return torch.ones(2, 3, requires_grad=True)


@pytest.mark.parametrize(
    "inner", [SGD, functools.partial(SGD, lr=0.5), functools.partial(functools.partial(SGD))]
)
def test_a_class_or_a_partial(inner: Any) -> None:
    optimizer = TopQGradientOptimizer([make_param()], inner, q=0.5, lr=0.25, momentum=0.9)
    assert type(optimizer.inner_opt) is SGD
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.defaults["momentum"] == 0.9


def test_an_instance_keeps_its_state_and_lends_its_groups() -> None:
    param = make_param()
    inner = Adam([param], lr=0.5)
    param.grad = torch.ones(2, 3)
    inner.step()
    groups, state = inner.param_groups, inner.state
    optimizer = TopQGradientOptimizer(None, inner, q=0.5, grad_scale=2.0)
    assert optimizer.inner_opt is inner
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    assert optimizer.defaults is inner.defaults
    assert groups[0]["q"] == 0.5
    param.grad = torch.ones(2, 3)
    optimizer.step()
    assert float(state[param]["step"]) == 2


def test_groups_are_added_through_the_inner_optimizer() -> None:
    class Counting(SGD):
        added = 0

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            super().add_param_group(param_group)
            self.added += 1

    optimizer = TopQGradientOptimizer([make_param()], Counting, q=0.5, lr=0.1)
    added = make_param()
    optimizer.add_param_group({"params": iter([added]), "q": 0.25})
    assert optimizer.inner_opt.added == 2  # type: ignore[attr-defined]
    assert optimizer.param_groups[1]["params"] == [added]
    assert optimizer.param_groups[1]["lr"] == 0.1
    assert optimizer.param_groups[1]["param_ndim"] == -1


def test_a_learning_rate_scheduler() -> None:
    param = make_param()
    optimizer = TopQGradientOptimizer([param], q=0.0, lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    rates = []
    for _ in range(3):
        param.grad = torch.ones(2, 3)
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.inner_opt.param_groups[0]["lr"])
    assert rates == [0.5, 0.25, 0.125]
    assert torch.equal(param.detach(), torch.full((2, 3), 1 - 1.75))


def test_a_scheduler_that_cycles_momentum() -> None:
    optimizer = TopQGradientOptimizer([make_param()], q=0.0, lr=1.0, momentum=0.9)
    scheduler = OneCycleLR(optimizer, max_lr=1.0, total_steps=4)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["momentum"] < 0.95


def test_a_scheduler_of_another_scheduled_optimizer_goes_on_after_a_load() -> None:
    first = TopQGradientOptimizer([make_param()], q=0.5, lr=1.0)
    scheduler = LambdaLR(first, lambda epoch: 1 / (1 + epoch))
    first.step()
    scheduler.step()
    second = TopQGradientOptimizer([make_param()], q=0.5, lr=1.0)
    resumed = LambdaLR(second, lambda epoch: 1 / (1 + epoch))
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    second.step()
    resumed.step()
    assert second.param_groups[0]["lr"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("q", [0.0, 0.5])
def test_lbfgs_sparsifies_after_each_evaluation(q: float) -> None:
    target = torch.arange(1.0, 7.0).view(2, 3)
    results = []
    for kind in (TopQGradientOptimizer, OracleOptimizer):
        param = make_param()
        optimizer: Any = kind([param], LBFGS, q=q, param_ndim=None, lr=0.5, max_iter=5)
        kept: list[int] = []

        def closure(
            optimizer: Any = optimizer, param: Tensor = param, kept: list[int] = kept
        ) -> Tensor:
            if param.grad is not None:
                kept.append(int(param.grad.count_nonzero()))
            optimizer.zero_grad()
            loss = ((param - target) ** 4).sum()
            torch.autograd.backward(loss)
            return loss

        with oracle_warnings_ignored():
            losses = [float(optimizer.step(closure).detach()) for _ in range(2)]
        assert losses[1] < losses[0]
        assert len(kept) > 2
        assert max(kept) <= round((1 - q) * 6)
        results.append((losses, param.detach()))
    (our_losses, ours), (oracle_losses, oracles) = results
    assert our_losses == oracle_losses
    assert torch.equal(ours, oracles)


def test_a_closure_runs_with_gradients_on_and_its_loss_is_returned() -> None:
    param = make_param()
    optimizer = TopQGradientOptimizer([param], q=0.5, param_ndim=None, lr=1.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (param * torch.arange(6.0).view(2, 3)).sum()
        torch.autograd.backward(loss)
        return float(loss.detach())

    assert optimizer.step(closure) == 15.0
    assert param.tolist() == [[1.0, 1.0, 1.0], [-2.0, -3.0, -4.0]]


def test_zero_grad_and_step_hooks() -> None:
    param = make_param()
    optimizer = TopQGradientOptimizer([param], q=0.5, param_ndim=None, lr=1.0)
    seen = []
    optimizer.register_step_pre_hook(
        lambda opt, args, kwargs: seen.append(int(param.grad.count_nonzero()))  # type: ignore[union-attr]
    )
    handle = optimizer.register_step_post_hook(
        lambda opt, args, kwargs: seen.append(int(param.grad.count_nonzero()))  # type: ignore[union-attr]
    )
    param.grad = torch.arange(1.0, 7.0).view(2, 3)
    optimizer.step()
    assert seen == [6, 3]
    handle.remove()
    optimizer.zero_grad(set_to_none=False)
    assert param.grad.count_nonzero() == 0
    optimizer.step()
    assert seen == [6, 3, 0]
    optimizer.zero_grad()
    assert param.grad is None


def test_grad_scaler_unscales_before_and_skips_an_overflow() -> None:
    model = nn.Linear(4, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = TopQGradientOptimizer(model.parameters(), q=0.5, param_ndim=None, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)

    def step(inputs: list[float]) -> None:
        optimizer.zero_grad()
        loss = model(torch.tensor([inputs])).sum()
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()

    step([1.0, 2.0, 3.0, 4.0])
    assert model.weight.tolist() == [[1.0, 1.0, -2.0, -3.0]]
    step([1.0, float("inf"), 3.0, 4.0])
    assert model.weight.tolist() == [[1.0, 1.0, -2.0, -3.0]]
    assert scaler.get_scale() == 512.0


def test_a_fused_inner_optimizer_equals_the_plain_one() -> None:
    results = []
    for fused in (True, False):
        param = make_param()
        optimizer = TopQGradientOptimizer([param], Adam, q=0.5, param_ndim=None, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for _ in range(3):
            param.grad = 64.0 * torch.arange(1.0, 7.0).view(2, 3)
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        results.append(param.detach())
    fused_result, plain = results
    assert torch.allclose(fused_result, plain, rtol=1e-6)


def test_a_double_backward_graph_notices_the_change() -> None:
    param = torch.ones(1, 64, requires_grad=True)
    optimizer = TopQGradientOptimizer([param], q=0.9, lr=1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
        torch.autograd.backward((param**3).sum(), create_graph=True)
    penalty = (param.grad**2).sum()  # type: ignore[operator]
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(penalty)
