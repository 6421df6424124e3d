"""Meaning of "sparsified by the hook" to a paired optimizer: top-Q alone, and for one step."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import torch
from rai_oracle import oracle_warnings_ignored
from rai_toolbox.optim import L1qNormedGradientOptim
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import (
    ChainedParamTransformingOptimizer,
    TopQGradientOptimizer,
    register_topq_hook,
)

pytestmark = pytest.mark.usefixtures("alone")
OPTIONS: dict[str, Any] = {"error_feedback": False, "exchange": "allgather", "value_format": None}


class L1q(TopQGradientOptimizer):
    """rai-toolbox's: top-Q, then the sign, then divided by its norm."""

    def _pre_step_transform_(self, param: Tensor, optim_group: dict[str, Any]) -> None:
        super()._pre_step_transform_(param, optim_group)
        assert param.grad is not None
        flat = param.grad.flatten(1).sign_()
        flat /= flat.abs().sum(1, keepdim=True)


def net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 8, bias=False)


def make(kind: Any, module: nn.Module, **options: Any) -> Any:
    return kind(module.parameters(), torch.optim.SGD, q=0.5, param_ndim=1, lr=1.0, **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 3) -> None:
    optimizer.zero_grad()
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    model(inputs).square().sum().backward()
    optimizer.step()


def hooked(
    kind: Any = TopQGradientOptimizer, **options: Any
) -> tuple[DistributedDataParallel, Any, Any]:
    module = net()
    optimizer = make(kind, module, **options)
    model = DistributedDataParallel(module)
    return model, optimizer, register_topq_hook(model, optimizer, **OPTIONS)


def nonzeros(module: nn.Module) -> int:
    (weight,) = module.parameters()
    assert weight.grad is not None
    return int(weight.grad.count_nonzero())


def test_what_a_subclass_does_after_top_q_is_done_beside_the_hook() -> None:
    ends = []
    for kind in (L1qNormedGradientOptim, L1q):
        module = net()
        optimizer = make(kind, module)
        with oracle_warnings_ignored():
            step(module, optimizer)
        ends.append(module.weight.detach().clone())
    model, optimizer, _ = hooked(L1q)
    step(model, optimizer)
    (weight,) = model.parameters()
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[1], weight)


def test_top_q_itself_is_left_to_the_hook_and_draws_nothing() -> None:
    model, optimizer, _ = hooked(dq=0.1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        optimizer.zero_grad()
    model(torch.ones(1, 8)).square().sum().backward()
    before = optimizer.generator.get_state()
    optimizer.step()
    assert torch.equal(before, optimizer.generator.get_state())


@pytest.mark.parametrize("kept", ["the state", "nothing"])
def test_a_model_that_is_wrapped_anew_is_sparsified_by_the_optimizer(kept: str) -> None:
    model, optimizer, state = hooked()
    step(model, optimizer)
    module = model.module
    if kept == "nothing":
        del model, state
        gc.collect()
    for plain in (module, DistributedDataParallel(module)):
        for seed in range(2):
            step(plain, optimizer, seed)
            assert nonzeros(module) == 32
    # and with a hook again it is the hook's
    again = DistributedDataParallel(module)
    register_topq_hook(again, optimizer, **(OPTIONS | {"exchange": "dense"}))
    step(again, optimizer)
    assert nonzeros(module) == 64


def test_a_gradient_that_did_not_come_through_the_hook_is_sparsified_here() -> None:
    model, optimizer, _ = hooked()
    step(model, optimizer)
    with model.no_sync():
        step(model, optimizer)
    assert nonzeros(model) == 32


def test_the_word_of_the_hook_holds_through_a_closure_and_not_in_copies() -> None:
    model, optimizer, _ = hooked()

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 8)).square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    # what the hook sent, q = 0.5 of rows of 8, and not half of that
    assert nonzeros(model) == 32
    assert optimizer.__getstate__().keys().isdisjoint({"_sparsified_once", "_is_sparsified"})


class Wrapping(torch.optim.Optimizer):
    """As Accelerate's: it holds another, whose groups are its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize("times", [1, 2])
def test_one_within_others_is_as_if_it_had_been_given(times: int) -> None:
    ends = []
    for wraps in (0, times):
        module = net()
        optimizer = make(TopQGradientOptimizer, module)
        for _ in range(wraps):
            optimizer = Wrapping(optimizer)
        model = DistributedDataParallel(module)
        # the average has 32 elements, of which a second selection would leave 16
        state = register_topq_hook(model, optimizer, exchange="allgather", bound=None)
        for seed in range(3):
            step(model, optimizer, seed)
            assert nonzeros(module) == 32
        with pytest.raises(ValueError, match=r"q=0\.5 with a TopQGradientOptimizer"):
            register_topq_hook(DistributedDataParallel(net()), optimizer, q=0.5)
        ends.append((module.weight.detach(), state.state_dict()["residuals"]["weight"]))
    (plain, kept), (wrapped, also_kept) = ends
    assert torch.equal(plain, wrapped)
    assert torch.equal(kept, also_kept)


def test_one_in_a_chain_and_one_of_two_are_refused_with_what_to_give() -> None:
    module = net()
    top_q = functools.partial(TopQGradientOptimizer, q=0.5)
    params = list(module.parameters())
    chain = functools.partial(ChainedParamTransformingOptimizer, params=params, param_ndim=1, lr=1)
    for chained in (chain(top_q), Wrapping(chain(top_q))):
        with pytest.raises(ValueError, match=r"in a Chained\w+.*expected it around the others"):
            register_topq_hook(DistributedDataParallel(module), chained, **OPTIONS)
    twice = TopQGradientOptimizer(None, make(TopQGradientOptimizer, module), q=0.5)
    with pytest.raises(ValueError, match="has 2 TopQGradientOptimizers"):
        register_topq_hook(DistributedDataParallel(module), twice, **OPTIONS)
    # what the error says to give
    around = TopQGradientOptimizer(None, chain(), q=0.5)
    model = DistributedDataParallel(module)
    register_topq_hook(model, around, **OPTIONS)
    step(model, around)
    assert nonzeros(module) == 32
