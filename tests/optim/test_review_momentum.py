"""Optimizers that ask for their groups again within a step, and moments that the switch is to drop.

Each of these was wrong once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from topq_dist import register_momentum_rule
from topq_dist.optim import momentum_rules
from topq_dist.optim.momentum_rules import MomentumSwitch


class Counting(Optimizer):
    """Writes to its groups in one loop and reads that in another, as Prodigy and D-Adaptation do.

    Its moment has the name that Adam's has.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "beta": 0.9, "count": 0, "read": 0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
        for group in self.param_groups:
            group["read"] = group["count"]
            for param in group["params"]:
                moment = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                moment.add_(1 - group["beta"])


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(momentum_rules, "_known", dict(momentum_rules._known))
    register_momentum_rule(Counting, lambda group: {"beta": 0.0} if group["beta"] else {})


def params_of(number: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2)) for _ in range(number)]


@pytest.mark.usefixtures("known")
def test_what_a_step_has_written_to_a_group_it_reads_in_the_same_step() -> None:
    params = params_of(1)
    optimizer = Counting(params)
    switch = MomentumSwitch(optimizer, params)
    switch.active = True
    for step in (1, 2):
        optimizer.step()
        (group,) = optimizer.param_groups
        assert (group["count"], group["read"], group["beta"]) == (step, step, 0.9)


@pytest.mark.usefixtures("known")
def test_what_a_step_writes_to_a_group_of_two_models_is_kept() -> None:
    params = params_of(3)
    optimizer = Counting(params)
    switches = [MomentumSwitch(optimizer, [param]) for param in params[:2]]
    for switch in switches:
        switch.active = True
    for step in (1, 2):
        optimizer.step()
        assert optimizer.param_groups[0]["count"] == optimizer.param_groups[0]["read"] == step


def test_the_moment_of_one_that_no_rule_is_known_for_is_left_alone() -> None:
    params = params_of(1)
    optimizer = Counting(params)
    switch = MomentumSwitch(optimizer, params)
    for steps, active in enumerate((False, True, False), start=1):
        switch.active = active
        optimizer.step()
        torch.testing.assert_close(
            optimizer.state[params[0]]["exp_avg"], torch.full((2, 2), steps * (1 - 0.9))
        )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muons_momentum_comes_back_with_the_first_gradient_then() -> None:
    params, others = params_of(1), params_of(1)
    muon: Any = torch.optim.Muon
    optimizer, reference = (muon(p, lr=0.1, momentum=0.9) for p in (params, others))
    switch = MomentumSwitch(optimizer, params)
    switch.active = True
    params[0].grad = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    switch.active = False
    for param in (params[0], others[0]):
        param.grad = torch.randn(2, 2, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    reference.step()
    assert torch.equal(
        optimizer.state[params[0]]["momentum_buffer"],
        reference.state[others[0]]["momentum_buffer"],
    )
