"""Steps without momentum: what they use, and that nobody else sees anything of it."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from topq_dist import TopQGradientOptimizer, register_momentum_rule
from topq_dist.compress.layout import Layout
from topq_dist.hook.loss_scale import LossScaleWatch
from topq_dist.optim.momentum_rules import MomentumSwitch, has_momentum, momentum_rule, stepping

STEPS = 4


def model_of(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(5, 4, bias=False)


def batch(step: int) -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(step))


def closure_of(model: nn.Module, optimizer: Optimizer, step: int) -> Callable[[], float]:
    def closure() -> float:
        optimizer.zero_grad()
        loss: Tensor = model(batch(step)).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    return closure


def values_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def moved(model: nn.Linear, optimizer: Optimizer) -> float:
    """Return how far a step goes along a gradient of ones."""
    model.weight.grad = torch.ones_like(model.weight)
    before = model.weight.detach().clone()
    optimizer.step()
    model.weight.grad = None
    steps = before - model.weight.detach()
    torch.testing.assert_close(steps, torch.full_like(steps, float(steps[0, 0])), atol=1e-6, rtol=0)
    return float(steps.mean())


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


@pytest.mark.parametrize("after", [False, True])
def test_an_error_within_a_step_leaves_the_users_values(after: bool) -> None:
    model = model_of()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    switch = MomentumSwitch(optimizer, model.parameters())
    switch.active = True
    before = values_of(optimizer)

    def raising(*_: object) -> Any:
        assert values_of(optimizer) == before
        raise KeyboardInterrupt

    if after:
        optimizer.register_step_post_hook(raising)
        model.weight.grad = torch.ones_like(model.weight)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(None if after else raising)
    assert values_of(optimizer) == before
    assert optimizer.state_dict()["param_groups"][0]["momentum"] == 0.9


def test_a_closure_that_turns_the_switch_counts_in_its_own_step() -> None:
    for target in (True, False):
        model, other = model_of(), model_of()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
        rate = 0.5 if target else 0.1
        reference = SGD(other.parameters(), lr=rate)
        switch = MomentumSwitch(optimizer, model.parameters())
        switch.active = not target
        evaluate = closure_of(model, optimizer, 0)

        def closure(
            switch: MomentumSwitch = switch,
            target: bool = target,
            evaluate: Callable[[], float] = evaluate,
        ) -> float:
            switch.active = target
            return evaluate()

        optimizer.step(closure)
        reference.step(closure_of(other, reference, 0))
        torch.testing.assert_close(model.weight, other.weight)


def test_groups_added_and_loaded_are_found() -> None:
    model, second = model_of(), model_of(1)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    switch = MomentumSwitch(optimizer, [*model.parameters(), *second.parameters()])
    switch.active = True
    optimizer.add_param_group({"params": list(second.parameters()), "lr": 0.2})
    assert moved(second, optimizer) == pytest.approx(2.0, rel=1e-4)
    saved = optimizer.state_dict()
    assert [group["lr"] for group in saved["param_groups"]] == [0.1, 0.2]
    saved["param_groups"][1].update(lr=0.4, momentum=0.5)
    optimizer.load_state_dict(saved)
    assert moved(second, optimizer) == pytest.approx(0.8, rel=1e-4)


def test_two_models_share_one_optimizer_in_groups_of_their_own_or_in_one() -> None:
    for grouped in (True, False):
        one, two = model_of(), model_of(1)
        weights = [one.weight, two.weight]
        optimizer = SGD(
            [{"params": [weight]} for weight in weights] if grouped else weights,
            lr=0.1,
            momentum=0.9,
        )
        for _ in range(2):
            moved(two, optimizer)
        switches = [MomentumSwitch(optimizer, model.parameters()) for model in (one, two)]
        switches[0].active = True
        assert moved(one, optimizer) == pytest.approx(1.0, rel=1e-4)
        switches[0].active, switches[1].active = False, True
        assert moved(two, optimizer) == pytest.approx(1.0, rel=1e-4)
        # the first gradient of a new momentum
        assert moved(one, optimizer) == pytest.approx(0.1, rel=1e-4)


def test_a_second_switch_replaces_the_first() -> None:
    model = model_of()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    first = MomentumSwitch(optimizer, model.parameters())
    first.active = True
    second = MomentumSwitch(optimizer, model.parameters())
    first.active = True
    assert not first.active
    assert moved(model, optimizer) == pytest.approx(0.1, rel=1e-4)
    second.active = True
    assert moved(model, optimizer) == pytest.approx(1.0, rel=1e-4)
    second.detach()
    second.detach()
    assert moved(model, optimizer) == pytest.approx(0.1, rel=1e-4)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_the_optimizer_keeps_no_switch_alive() -> None:
    model = model_of()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    switch = MomentumSwitch(optimizer, model.parameters())
    switch.active = True
    del switch
    gc.collect()
    assert moved(model, optimizer) == pytest.approx(0.1, rel=1e-4)


class Pickled(SGD):
    """One that is pickled with all that it has."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))


@pytest.mark.parametrize("kind", [SGD, Pickled])
def test_copies_are_plain_optimizers(kind: type[SGD]) -> None:
    model = model_of()
    optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
    switch = MomentumSwitch(optimizer, model.parameters())
    switch.active = True
    moved(model, optimizer)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):  # noqa: S301
        assert type(copied) is kind
        [weight] = copied.param_groups[0]["params"]
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        copied.step()
        torch.testing.assert_close(before - weight, torch.full_like(weight, 0.1))


def test_wrapped_optimizers_are_found() -> None:
    model = model_of()
    wrapped = TopQGradientOptimizer(
        model.parameters(), SGD, q=0.0, param_ndim=None, lr=0.1, momentum=0.9
    )
    twice = TopQGradientOptimizer(InnerOpt=wrapped, params=None, q=0.0, param_ndim=None)
    assert stepping(twice) is wrapped.inner_opt
    assert has_momentum(twice, model.parameters())
    switch = MomentumSwitch(twice, model.parameters())
    switch.active = True
    assert moved(model, twice) == pytest.approx(1.0, rel=1e-4)
    assert twice.param_groups[0]["momentum"] == 0.9


class Wrapper(Optimizer):
    """One that steps another, as Accelerate's does."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)


def test_optimizers_of_other_libraries_are_looked_into() -> None:
    model = model_of()
    wrapper = Wrapper(SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert stepping(wrapper) is wrapper.optimizer
    switch = MomentumSwitch(wrapper, model.parameters())
    switch.active = True
    assert moved(model, wrapper) == pytest.approx(1.0, rel=1e-4)


def test_a_compiled_step_follows_the_switch_and_the_rate() -> None:
    model = model_of()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    switch = MomentumSwitch(optimizer, model.parameters())
    # a hook's look at every optimizer's step, of which compiling knows nothing
    watch = LossScaleWatch()
    layout = Layout(names=("weight",), shapes=(tuple(model.weight.shape),))
    watch.saw(torch.ones(layout.numel), layout, [model.weight])

    def step() -> None:
        optimizer.step()

    compiled: Any = torch.compile(step, backend="aot_eager")
    for active, lr, expected in ((True, 0.1, 1.0), (True, 0.2, 2.0), (False, 0.2, 0.2)):
        switch.active = active
        optimizer.param_groups[0]["lr"] = lr
        model.weight.grad = torch.ones_like(model.weight)
        before = model.weight.detach().clone()
        compiled()
        torch.testing.assert_close(before - model.weight, torch.full_like(before, expected))


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


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_unscales_and_skips_as_ever(fused: bool) -> None:
    model, other = model_of(), model_of()
    optimizer = Adam(model.parameters(), fused=fused, foreach=False)
    reference = Adam(other.parameters(), betas=(0.0, 0.999), fused=fused, foreach=False)
    switch = MomentumSwitch(optimizer, model.parameters())
    switch.active = True
    for one, stepper in ((model, optimizer), (other, reference)):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(STEPS):
            stepper.zero_grad()
            inputs = batch(step) * (math.inf if step == 1 else 1.0)
            scaler.scale(one(inputs).square().sum()).backward()
            before = one.weight.detach().clone()
            scaler.step(stepper)
            scaler.update()
            assert torch.equal(before, one.weight) == (step == 1)
    assert torch.equal(model.weight, other.weight)
