"""A hook that is registered and never called is warned of, once, in the fifth step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hook_cases import loss_of, small_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from topq_dist import TopQGradientOptimizer, TopQState, register_topq_hook

pytestmark = pytest.mark.usefixtures("alone")


def said_by_step(model: nn.Module, optimizer: Optimizer, steps: int = 12) -> list[str]:
    """Return what each of some steps has warned of, an empty text for nothing."""
    said = []
    for step in range(steps):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.zero_grad()
            loss_of(model, step, 0).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        said.append(" ".join(str(one.message) for one in caught))
    return said


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def paired(model: nn.Module) -> Optimizer:
    return TopQGradientOptimizer(
        model.parameters(), torch.optim.SGD, q=0.5, param_ndim=None, lr=0.1
    )


@pytest.mark.parametrize("make", [sgd, paired])
@pytest.mark.parametrize("momentum", ["feedback", "optimizer"])
def test_a_model_that_goes_by_its_hook_is_named_in_the_fifth_step(
    make: Callable[[nn.Module], Optimizer], momentum: Any
) -> None:
    model = DistributedDataParallel(small_model())
    optimizer = make(model)
    register_topq_hook(model, optimizer, exchange="allgather", momentum=momentum)
    said = said_by_step(model.module, optimizer)
    assert [bool(one) for one in said] == [step == 4 for step in range(12)]
    assert "the hook was not called" in said[4]
    assert ".module" in said[4]


def test_a_state_that_nobody_registers_is_named_as_well() -> None:
    module = small_model()
    state = TopQState(module, exchange="allgather")
    model = DistributedDataParallel(module)
    state.optimizer = optimizer = sgd(model)
    said = said_by_step(model, optimizer)
    assert [step for step, one in enumerate(said) if one] == [4]


def test_nothing_is_said_of_a_hook_that_is_called() -> None:
    model = DistributedDataParallel(small_model())
    optimizer = sgd(model)
    register_topq_hook(model, optimizer, exchange="allgather")
    with model.no_sync():
        assert not any(said_by_step(model, optimizer, steps=4))
    assert not any(said_by_step(model, optimizer))


def test_a_hook_registered_anew_replaces_the_first_and_copies_have_none() -> None:
    module = small_model()
    optimizer = sgd(module)
    register_topq_hook(DistributedDataParallel(module), optimizer, exchange="allgather")
    duplicate = copy.deepcopy((module, optimizer))
    assert not any(said_by_step(*duplicate))
    model = DistributedDataParallel(module)
    register_topq_hook(model, optimizer, exchange="allgather")
    assert not any(said_by_step(model, optimizer))
