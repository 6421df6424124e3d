"""The switch of an optimizer's momentum behind closures, errors, copies, wrappers and scalers."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim.one_layer import STEPS, batch, closure_of, model_of, moved, values_of
from torch.optim import SGD, Adam, Optimizer

from topq_dist import TopQGradientOptimizer
from topq_dist.compress.layout import Layout
from topq_dist.hook.loss_scale import LossScaleWatch
from topq_dist.optim.momentum_rules import MomentumSwitch, has_momentum, stepping


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
