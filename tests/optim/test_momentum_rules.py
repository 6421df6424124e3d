"""Steps without momentum: which values of its group each optimizer uses, and by whose rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from optim.one_layer import STEPS, closure_of, model_of, moved, values_of
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from topq_dist import register_momentum_rule
from topq_dist.optim.momentum_rules import MomentumSwitch, has_momentum, momentum_rule

TAKEN_OUT: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = [
    ("SGD", {"lr": 0.1, "momentum": 0.9}, {"lr": 0.1 / (1 - 0.9)}),
    (
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"lr": 0.1 / (1 - 0.9), "weight_decay": 0.1},
    ),
    ("SGD", {"lr": 0.1, "momentum": 0.5, "dampening": 0.5}, {"lr": 0.1}),
    ("SGD", {"lr": 0.1}, {"lr": 0.1}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.5}, {"lr": 0.02}),
    ("Adam", {"betas": (0.9, 0.99)}, {"betas": (0.0, 0.99)}),
    ("AdamW", {"betas": (0.9, 0.99), "weight_decay": 0.1}, None),
    ("NAdam", {"betas": (0.9, 0.99)}, {"betas": (0.0, 0.99)}),
    ("RAdam", {"betas": (0.9, 0.99)}, {"betas": (0.0, 0.99)}),
    ("Adamax", {"betas": (0.9, 0.99)}, {"betas": (0.0, 0.99)}),
    ("Muon", {"lr": 0.1, "momentum": 0.9}, {"lr": 0.1, "momentum": 0.0}),
    ("Adagrad", {}, {}),
    ("Adadelta", {}, {}),
    ("Adafactor", {}, {}),
    ("ASGD", {}, {}),
    ("Rprop", {}, {}),
    ("LBFGS", {}, {}),
]


@pytest.mark.parametrize(("name", "options", "without"), TAKEN_OUT)
def test_steps_are_those_without_momentum_and_groups_the_users(
    name: str, options: dict[str, Any], without: dict[str, Any] | None
) -> None:
    kind: Any = getattr(torch.optim, name, None)
    if kind is None:
        pytest.skip(f"this torch has no {name}")
    if without is None:
        without = options | {"betas": (0.0, 0.99)}
    model, other = model_of(), model_of()
    optimizer, reference = kind(model.parameters(), **options), kind(other.parameters(), **without)
    switch = MomentumSwitch(optimizer, model.parameters())
    switch.active = True
    before = values_of(optimizer)
    for step in range(STEPS):
        optimizer.step(closure_of(model, optimizer, step))
        reference.step(closure_of(other, reference, step))
        assert values_of(optimizer) == before
    torch.testing.assert_close(model.weight, other.weight, rtol=1e-6, atol=1e-7)
    # and with its momentum again
    switch.active = False
    optimizer.step(closure_of(model, optimizer, STEPS))
    assert bool(model.weight.isfinite().all())


@pytest.mark.parametrize("kind", [SGD, RMSprop])
def test_a_momentum_that_comes_back_starts_with_the_first_gradient_then(kind: type[Any]) -> None:
    model, other = model_of(), model_of()
    optimizer = kind(model.parameters(), lr=0.01, momentum=0.9)
    switch = MomentumSwitch(optimizer, model.parameters())
    for step in range(STEPS):
        # dense, sparse, dense
        switch.active = step in (1, 2)
        optimizer.step(closure_of(model, optimizer, step))
        buffer = optimizer.state[model.weight].get("momentum_buffer")
        if step in (1, 2):
            assert buffer is None or not buffer.any()
    fresh = SGD(other.parameters(), lr=0.01, momentum=0.9)
    fresh.step(closure_of(other, fresh, STEPS - 1))
    if kind is SGD:
        torch.testing.assert_close(buffer, model.weight.grad)
    else:
        expected = model.weight.grad / (optimizer.state[model.weight]["square_avg"].sqrt() + 1e-8)
        torch.testing.assert_close(buffer, expected)
    # a run resumed from a checkpoint of either phase finds what it looks for
    switch.active = True
    optimizer.step(closure_of(model, optimizer, 0))
    resumed = kind(other.parameters(), lr=0.01, momentum=0.9)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.step(closure_of(other, resumed, 0))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RAdam, torch.optim.NAdam])
def test_adams_last_sparse_gradient_is_not_applied_once_more(kind: type[Any]) -> None:
    model = model_of()
    optimizer = kind(model.parameters(), lr=0.01, betas=(0.9, 0.999), weight_decay=0.0)
    switch = MomentumSwitch(optimizer, model.parameters())
    switch.active = True
    optimizer.step(closure_of(model, optimizer, 0))
    assert bool(optimizer.state[model.weight]["exp_avg"].any())
    switch.active = False
    before = model.weight.detach().clone()
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert torch.equal(model.weight, before)


def test_schedules_of_rate_and_momentum_are_followed() -> None:
    model, other = model_of(), model_of()
    one = SGD(model.parameters(), lr=0.1, momentum=0.9)
    alone = SGD(other.parameters(), lr=0.1, momentum=0.9)
    switch = MomentumSwitch(one, model.parameters())
    switch.active = True
    makes: list[Callable[[Optimizer], Any]] = [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=9),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=7),
    ]
    for make in makes:
        schedule, same = make(one), make(alone)
        for _ in range(8):
            assert values_of(one) == values_of(alone)
            [group] = one.param_groups
            expected = group["lr"] / (1 - group["momentum"])
            assert moved(model, one) == pytest.approx(expected, rel=1e-3, abs=1e-6)
            moved(other, alone)
            schedule.step()
            same.step()
        assert schedule.state_dict() == same.state_dict()


def test_one_cycle_cycles_the_betas_that_the_user_sees() -> None:
    model = model_of()
    optimizer = AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    used = watched(optimizer)
    switch = MomentumSwitch(optimizer, model.parameters())
    switch.active = True
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
    seen = []
    for _ in range(8):
        moved(model, optimizer)
        seen.append(optimizer.param_groups[0]["betas"][0])
        schedule.step()
    assert len(set(seen)) > 5
    assert {group["betas"] for group in used} == {(0.0, 0.99)}


def watched(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return a list that will hold the first group of each step, as the step sees it."""
    used: list[dict[str, Any]] = []

    kind: Any = type(optimizer)

    class Watching(kind):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            used.append({n: v for n, v in self.param_groups[0].items() if n != "params"})
            return super().step(closure)

    optimizer.__class__ = Watching
    optimizer._patch_step_function()
    return used


class Lion(Optimizer):
    """One that torch does not know, and that notes in its group what it has done."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99), "d": 0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["d"] += 1
            group["beta1 of the last step"] = group["betas"][0]
            with torch.no_grad():
                for param in group["params"]:
                    param -= group["lr"] * param.grad.sign()


def test_rules_are_registered_for_a_class_and_those_derived_from_it() -> None:
    class Derived(Lion):
        pass

    model = model_of()
    optimizer = Derived(model.parameters())
    assert momentum_rule(optimizer) is None
    assert not has_momentum(optimizer, model.parameters())
    switch = MomentumSwitch(optimizer, model.parameters())
    switch.active = True
    moved(model, optimizer)
    assert optimizer.param_groups[0]["beta1 of the last step"] == 0.9

    def rule(group: Mapping[str, Any]) -> dict[str, Any]:
        return {"betas": (0.0, group["betas"][1])}

    register_momentum_rule(Lion, rule)
    switch = MomentumSwitch(optimizer, model.parameters())
    switch.active = True
    moved(model, optimizer)
    # what the step writes to its group is kept, but for what is replaced
    assert optimizer.param_groups[0]["d"] == 2
    assert optimizer.param_groups[0]["beta1 of the last step"] == 0.0
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    wrong: Any = nn.Linear
    no_rule: Any = "beta1"
    with pytest.raises(TypeError, match=r"optimizer_class=.*Linear.*expected"):
        register_momentum_rule(wrong, rule)
    with pytest.raises(TypeError, match=r"rule='beta1'.*expected"):
        register_momentum_rule(Lion, no_rule)


def test_rates_may_be_tensors_and_kernels_fused() -> None:
    for fused in (False, True):
        model = model_of()
        rate = torch.tensor(0.1)
        optimizer = SGD(
            model.parameters(), lr=rate, momentum=0.9, nesterov=True, fused=fused, foreach=False
        )
        switch = MomentumSwitch(optimizer, model.parameters())
        switch.active = True
        assert moved(model, optimizer) == pytest.approx(1.0, rel=1e-4)
        assert optimizer.param_groups[0]["lr"] is rate
        assert float(rate) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("lr", "momentum", "message"),
    [(0.1, 1.0, r"momentum=1.0: expected"), (0.1, math.nan, "expected"), (1e308, 0.9, "lr=1e.308")],
)
def test_a_momentum_that_does_not_add_up_is_named(lr: float, momentum: float, message: str) -> None:
    model = model_of()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.param_groups[0].update(lr=lr, momentum=momentum)
    switch = MomentumSwitch(optimizer, model.parameters())
    switch.active = True
    with pytest.raises(ValueError, match=message):
        moved(model, optimizer)


def test_the_rate_stays_where_the_gradients_carry_a_momentum() -> None:
    model = model_of()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.75, weight_decay=0.01)
    used = watched(optimizer)
    switch = MomentumSwitch(optimizer, model.parameters(), scale_rate=False)
    switch.active = True
    optimizer.step(closure_of(model, optimizer, 0))
    assert (used[0]["lr"], used[0]["momentum"]) == (0.1, 0.0)
    # what decays has gone through the momentum, too
    assert used[0]["weight_decay"] == pytest.approx(0.04)
