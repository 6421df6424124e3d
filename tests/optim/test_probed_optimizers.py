"""The step by which torch's checkpoint functions look at an optimizer's state changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from topq_dist import ParamTransformingOptimizer, TopQGradientOptimizer
from topq_dist.optim.momentum_rules import MomentumSwitch

OPTIONS = [StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)]


def make_model() -> nn.Linear:
    model = nn.Linear(6, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(1.0, 1.0 + parameter.numel()).view_as(parameter))
    return model


def steps(model: nn.Linear, optimizer: torch.optim.Optimizer, probed: bool) -> list[Tensor]:
    """Return the parameters after some steps, between which the state may be got and set."""
    for step in range(4):
        optimizer.zero_grad()
        for options in OPTIONS if probed else ():
            state = get_optimizer_state_dict(model, optimizer, options=options)
            set_optimizer_state_dict(model, optimizer, state, options=options)
        torch.autograd.backward(model(torch.full((3, 6), 0.1 * (step + 1))).square().mean())
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


class Decaying(ParamTransformingOptimizer):
    def _post_step_transform_(self, param: Tensor, optim_group: dict[str, Any]) -> None:
        param.mul_(0.9)


@pytest.mark.parametrize("made", ["dq", "bias", "momentum, bias", "transform", "around another"])
def test_a_run_goes_on_as_if_nobody_had_asked(made: str) -> None:
    def run(probed: bool) -> list[Tensor]:
        model, sgd = make_model(), torch.optim.SGD
        generator = torch.Generator().manual_seed(3)
        drawn: dict[str, Any] = {"q": 0.5, "dq": 0.4, "param_ndim": None, "lr": 0.1}
        drawn["generator"] = generator
        makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
            "dq": lambda: TopQGradientOptimizer(model.parameters(), sgd, **drawn),
            "bias": lambda: TopQGradientOptimizer(model.parameters(), sgd, grad_bias=1.0, **drawn),
            "momentum, bias": lambda: TopQGradientOptimizer(
                model.parameters(), sgd, grad_bias=1.0, momentum=0.9, **drawn
            ),
            "transform": lambda: Decaying(model.parameters(), sgd, lr=0.1),
            "around another": lambda: Decaying(
                None, TopQGradientOptimizer(model.parameters(), sgd, **drawn)
            ),
        }
        return steps(model, makers[made](), probed)

    for one, other in zip(run(probed=True), run(probed=False), strict=True):
        assert torch.equal(one, other)


def test_nor_does_it_matter_while_momentum_is_taken_out() -> None:
    def run(probed: bool) -> list[Tensor]:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        switch = MomentumSwitch(optimizer, model.parameters())
        switch.active = True
        made = steps(model, optimizer, probed)
        assert all(group["lr"] == 0.1 for group in optimizer.param_groups)
        return made

    for one, other in zip(run(probed=True), run(probed=False), strict=True):
        assert torch.equal(one, other)


def test_a_step_at_rate_0_with_a_gradient_is_one(recwarn: pytest.WarningsRecorder) -> None:
    generator = torch.Generator().manual_seed(3)
    param = nn.Parameter(torch.ones(4, 5))
    optimizer = TopQGradientOptimizer([param], q=0.5, dq=0.4, generator=generator, lr=0.0)
    before = generator.get_state()
    param.grad = torch.zeros(4, 5)
    optimizer.step()
    assert torch.equal(generator.get_state(), before)
    param.grad[0, 0] = 1.0
    optimizer.step()
    assert not torch.equal(generator.get_state(), before)
