"""Kept-back gradients are applied at the rate of their own step, whatever the schedule does."""

from __future__ import annotations

import copy
from collections.abc import Collection
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import register_topq_hook
from topq_dist.compress.layout import Layout
from topq_dist.compress.residual import Residuals
from topq_dist.compress.residual_rates import check_rates
from topq_dist.hook.optimizer_rates import OptimizerRates

pytestmark = pytest.mark.gloo


class Held:
    """Two parameters of an optimizer's two groups, each with a residual of ones."""

    def __init__(
        self,
        kind: type[torch.optim.Optimizer] = torch.optim.SGD,
        *,
        half: Collection[str] = (),
        **options: Any,
    ) -> None:
        self.parameters = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
        self.optimizer = kind([{"params": [one]} for one in self.parameters], **options)
        layout = Layout(names=("a", "b"), shapes=((3,), (2,)))
        self.residuals = Residuals()
        self.flat = self.residuals.flat(layout, dtype=torch.float32, device=torch.device("cpu"))
        self.flat.fill_(1.0)
        names: dict[Tensor, str] = dict(zip(self.parameters, "ab", strict=True))
        self.rates = OptimizerRates(names, self.residuals, half)

    def step(self, *rates: Any) -> list[float]:
        """Go through a step at these rates; return a value of each residual."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        self.rates.begin_step(self.optimizer)
        return [float(self.flat[0]), float(self.flat[3])]


def test_a_residual_keeps_its_product_with_the_rate() -> None:
    held = Held(lr=0.4)
    assert held.step(0.4, 0.4) == [1.0, 1.0]
    assert held.step(0.2, 0.8) == pytest.approx([2.0, 0.5])
    # the group whose rate stays is let alone
    assert held.step(0.1, 0.8) == pytest.approx([4.0, 0.5])


def test_small_changes_are_taken_together() -> None:
    held = Held(lr=1.0)
    seen = [held.step(rate, 1.0)[0] for rate in (1.0, 0.97, 0.96, 0.95, 0.93)]
    assert seen == pytest.approx([1.0, 1.0, 1.0, 1 / 0.95, 1 / 0.95])


def test_a_schedule_that_ends_at_nought_ends_at_a_twentieth() -> None:
    held = Held(lr=1.0)
    for rate in (1.0, 0.3, 1e-3, 1e-30, 0.0):
        last = held.step(rate, 1.0)
    assert last == pytest.approx([20.0, 1.0])
    assert held.step(1.0, 1.0) == pytest.approx([1.0, 1.0])


def test_what_comes_in_while_the_rate_is_nought_counts_at_the_lowest() -> None:
    held = Held(lr=1.0)
    assert held.step(0.0, 0.0) == [1.0, 1.0]
    assert held.step(1.0, 0.0) == pytest.approx([0.05, 1.0])
    assert held.step(0.0, 0.0) == pytest.approx([1.0, 1.0])
    assert held.step(0.1, 0.0) == pytest.approx([0.5, 1.0])
    # and while there is none, at that of the next
    for none in (None, "fast", -1.0, float("nan"), torch.zeros(2)):
        held.step(none, 0.0)
    assert held.step(0.1, 0.0) == held.step(0.1, 0.0) == pytest.approx([0.5, 1.0])


def test_what_would_break_a_mean_of_squares_or_half_precision_is_left() -> None:
    held = Held(torch.optim.AdamW, lr=1.0)
    held.step(1.0, 1.0)
    # a step of a schedule, all of what waits at once
    assert held.step(0.1, 0.8) == pytest.approx([1.0, 1.25])
    assert held.step(0.09, 4.0) == pytest.approx([1 / 0.9, 0.25])
    held = Held(lr=1.0, half="ab")
    held.step(1.0, 1.0)
    assert held.step(0.5, 2.0) == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize(
    ("kind", "at_once"),
    [(name, False) for name in ("Adagrad", "Adadelta", "Adamax", "RMSprop", "NAdam", "Adafactor")]
    + [("SGD", True), ("ASGD", True), ("Unknown", False)],
)
def test_who_remembers_squares_is_spared_a_sudden_fall(kind: str, at_once: bool) -> None:
    class Stranger(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})

    held = Held(getattr(torch.optim, kind, Stranger), lr=1.0)
    held.step(1.0, 1.0)
    assert held.step(0.1, 0.1) == pytest.approx([10.0, 10.0] if at_once else [1.0, 1.0])
    assert held.step(0.08, 0.1)[0] == pytest.approx(12.5 if at_once else 1.25)


@pytest.mark.parametrize("options", [{"half": "ab"}, {"kind": torch.optim.AdamW}], ids=repr)
def test_what_was_not_followed_down_is_not_followed_up(options: dict[str, Any]) -> None:
    held = Held(lr=1.0, **options)
    for _ in range(5):
        assert held.step(1.0, 1.0) == pytest.approx([1.0, 1.0])
        assert held.step(0.5, 0.3) == pytest.approx([1.0, 1.0])
    # but for what is above where it was before
    assert held.step(2.0, 0.9) == pytest.approx([0.5, 1.0])
    assert held.step(2.0, 4.0) == pytest.approx([0.5, 0.25])


def test_rates_at_the_ends_of_what_a_float_can_be() -> None:
    held = Held(lr=1.0)
    for rate in (5e-324, 0.0, 1e308, 10**400):
        assert all(number >= 0 for number in held.step(rate, 1.0))


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, torch.tensor])
def test_a_rate_may_be_any_real_number(number: Any) -> None:
    held = Held(lr=4.0)
    held.step(4.0, 4.0)
    assert held.step(number(2), 4.0) == pytest.approx([2.0, 1.0])


@given(
    st.lists(st.floats(0.0, 1e3), min_size=2, max_size=20),
    st.sampled_from([torch.optim.SGD, torch.optim.AdamW]),
    st.booleans(),
)
def test_the_rates_that_a_run_can_have_are_read_again(
    rates: list[float], kind: type[torch.optim.Optimizer], half: bool
) -> None:
    held = Held(kind, lr=1.0, half="a" if half else "")
    for before, rate in pairwise(rates):
        held.step(before, before)
        held.step(rate, before)
        check_rates(held.rates.state())
        _, at, highest = held.rates.state()["a"]
        # what has been in since the first counts at most at `at`, whatever the way here
        assert 0 <= held.flat[0] <= (highest / at if at else 1.0) * (1 + 1e-5)


def test_groups_of_others_and_groups_that_change() -> None:
    held = Held(lr=1.0)
    other = nn.Parameter(torch.zeros(1))
    held.optimizer.add_param_group({"params": [other], "lr": "none of the hook's"})
    assert held.step(1.0, 0.1) == [1.0, 1.0]
    one, two = held.optimizer.param_groups[:2]
    one["params"], two["params"] = two["params"], one["params"]
    assert held.step(1.0, 0.1) == pytest.approx([10.0, 0.1])


def test_the_rate_is_what_the_momentum_adds_up_to() -> None:
    held = Held(lr=0.1, momentum=0.9)
    held.step(0.1, 0.1)
    for group in held.optimizer.param_groups:
        group["momentum"] = 0.8
    # 0.1 / (1 - 0.9) = 1, and 0.1 / (1 - 0.8) = 0.5
    assert held.step(0.1, 0.2) == pytest.approx([2.0, 1.0])
    held.optimizer.param_groups[0]["momentum"] = 1.0
    held.step(0.1, 0.2)
    held = Held(torch.optim.AdamW, lr=0.1)
    held.step(0.1, 0.1)
    held.optimizer.param_groups[0]["betas"] = 0.5, 0.999
    assert held.step(0.1, torch.tensor(0.08)) == pytest.approx([1.0, 1.25])


def test_a_state_goes_on_where_it_was() -> None:
    held, other = Held(lr=1.0), Held(lr=1.0)
    held.step(1.0, 0.97)
    check_rates(held.rates.state())
    other.rates.load_state({**held.rates.state(), "frozen since": [1.0, 1.0]})
    assert other.step(0.5, 0.94) == held.step(0.5, 0.94) == pytest.approx([2.0, 1.0])
    assert other.rates.state() == held.rates.state()
    # two numbers each, where falls that were not followed were not remembered
    other.rates.load_state({name: [one[0], one[2]] for name, one in held.rates.state().items()})
    assert other.rates.state() == held.rates.state()
    # a residual times 1e300 / 0.1 is past all numbers
    too_large = {"a": [1e300, 0.1]}
    for wrong in (
        {"a": [1.0]},
        {"a": [1.0, 0.0]},
        {"a": [1.0, "1"]},
        {"a": 1.0},
        {"a": [0.0, 1.0, 1.0]},
        {"a": [1.0, 2.0, 1.5]},
        {"a": [1.0, float("nan"), 2.0]},
        {"a": [1.0, 1.0, float("inf")]},
        too_large,
    ):
        with pytest.raises(ValueError, match="rates\\['a'\\]"):
            check_rates(wrong)
    with pytest.raises(TypeError, match="rates=3"):
        check_rates(3)


@pytest.fixture
def model(alone: dist.ProcessGroup) -> DistributedDataParallel:
    torch.manual_seed(0)
    return DistributedDataParallel(nn.Linear(40, 1, bias=False))


def gradient_step(model: DistributedDataParallel, optimizer: Any, gradient: Tensor) -> None:
    optimizer.zero_grad()
    model(gradient[None]).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("keep_rate", [True, False])
def test_all_that_was_kept_arrives_at_its_own_rate(
    model: DistributedDataParallel, keep_rate: bool
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = register_topq_hook(
        model,
        optimizer,
        q=0.975,
        keep_rate=keep_rate,
        value_format="fp32",
        bound=None,
        exchange="allgather",
    )
    before = model.module.weight.detach().clone()
    gradients = [torch.randn(40) for _ in range(4)]
    rates = [1.0, 1.0, 0.5, 0.1]
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        gradient_step(model, optimizer, gradient)
    moved = before - model.module.weight.detach()
    (residual,) = state.state_dict()["residuals"].values()
    wanted = torch.stack([a * b for a, b in zip(rates, gradients, strict=True)]).sum(0)
    # what has been sent, and what is still kept at the last rate
    arrived = moved + rates[-1] * residual
    assert torch.allclose(arrived, wanted, rtol=1e-4, atol=1e-5) == keep_rate


def test_a_resumed_run_goes_on_to_the_bit(model: DistributedDataParallel) -> None:
    gradients = [torch.randn(40) for _ in range(8)]

    def trained(steps: range, saved: dict[str, Any] | None) -> tuple[Tensor, dict[str, Any]]:
        copied = DistributedDataParallel(copy.deepcopy(model.module))
        optimizer = torch.optim.AdamW(copied.parameters(), lr=0.1)
        state = register_topq_hook(copied, optimizer, q=0.9, exchange="allgather")
        if saved is not None:
            copied.module.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            state.load_state_dict(saved["topq"])
        for step in steps:
            # half of the changes are too small to be followed at once
            optimizer.param_groups[0]["lr"] = 0.1 * 0.975**step
            gradient_step(copied, optimizer, gradients[step])
        return copied.module.weight.detach(), {
            "model": copied.module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "topq": state.state_dict(),
        }

    whole, _ = trained(range(8), None)
    _, saved = trained(range(4), None)
    assert saved["topq"]["momentum"]["rates"] == {"weight": [0.1 * 0.975**2, 0.1 * 0.975**2, 0.1]}
    assert torch.equal(trained(range(4, 8), saved)[0], whole)


def test_a_hook_that_is_taken_off_holds_no_rates(model: DistributedDataParallel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = register_topq_hook(model, optimizer, q=0.9, exchange="allgather")
    gradient_step(model, optimizer, torch.randn(40))
    assert state.state_dict()["momentum"]["rates"] == {"weight": [1.0, 1.0, 1.0]}
    state.detach()
    assert state.state_dict()["momentum"]["rates"] == {}


def test_knobs(model: DistributedDataParallel) -> None:
    with pytest.raises(TypeError, match="keep_rate=1: expected True or False"):
        register_topq_hook(model, keep_rate=1)  # type: ignore[call-overload]
