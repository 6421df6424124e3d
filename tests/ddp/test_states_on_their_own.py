"""A state by itself: what it is asked for and set to before its ranks are known, and its copies."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch.distributed as dist
from hook_cases import loss_of, small_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from topq_dist import Elastic, TopQGradientOptimizer, TopQState, register_topq_hook, topq_hook
from topq_dist.telemetry.catalog import RESIDUAL_RATIO

pytestmark = pytest.mark.usefixtures("alone")
OPTIONS: dict[str, Any] = {"q": 0.9, "exchange": "allgather", "momentum": "optimizer"}


class Loaded(dict[str, Any]):
    """A state to load that can be seen to go."""


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1)


def paired(model: nn.Module) -> Optimizer:
    return TopQGradientOptimizer(model.parameters(), SGD, q=0.5, param_ndim=None, lr=0.1)


def wrapped(state: TopQState, module: nn.Module) -> DistributedDataParallel:
    model = DistributedDataParallel(module)
    model.register_comm_hook(state, topq_hook)
    return model


def step_of(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step, 0).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def test_q_in_the_groups_of_an_optimizer_is_an_attribute_error() -> None:
    module = small_model()
    state = register_topq_hook(DistributedDataParallel(module), paired(module))
    with pytest.raises(AttributeError, match="q lives in the optimizer's groups"):
        state.q  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        state.nothing  # noqa: B018
    assert getattr(state, "q", None) is None
    assert not hasattr(state, "q")


def test_an_optimizer_set_later_leaves_q_as_it_was_set() -> None:
    module = small_model()
    state = TopQState(module, **OPTIONS)
    state.q = 0.5
    state.optimizer = sgd(module)
    assert state.q == 0.5
    with pytest.raises(ValueError, match=r"q=0\.5 with a TopQGradientOptimizer"):
        state.optimizer = paired(module)
    default = TopQState(module, exchange="allgather")
    default.optimizer = paired(module)


def said_in_steps(model: nn.Module, optimizers: list[Optimizer]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            for optimizer in optimizers:
                step_of(model, optimizer, step)
    return [str(one.message) for one in caught]


def test_an_optimizer_that_another_has_replaced_is_not_watched() -> None:
    module = small_model()
    first, second = sgd(module), sgd(module)
    state = TopQState(module, first, **OPTIONS)
    state.optimizer = second
    assert said_in_steps(wrapped(state, module), [second, first]) == []


def test_an_optimizer_that_was_refused_is_not_watched() -> None:
    module = small_model()
    model = DistributedDataParallel(module, find_unused_parameters=True)
    optimizer = sgd(module)
    place = Elastic(store="localhost:1", name="0", ranks=1)
    with pytest.raises(ValueError, match="find_unused_parameters"):
        TopQState(model, optimizer, elastic=place, **OPTIONS)
    assert said_in_steps(model, [optimizer]) == []


def test_a_loaded_state_is_let_go_once_it_was_taken_up() -> None:
    module = small_model()
    state = TopQState(module, **OPTIONS)
    step_of(wrapped(state, module), sgd(module), 0)
    saved = Loaded(state.state_dict())
    again = small_model()
    resumed = TopQState(again, **OPTIONS)
    resumed.load_state_dict(saved)
    held = weakref.ref(saved)
    del saved
    step_of(wrapped(resumed, again), sgd(again), 1)
    gc.collect()
    assert held() is None
    assert resumed.stats().steps == 2


def pickled(one: Any) -> Any:
    return pickle.loads(pickle.dumps(one))  # noqa: S301 - its own bytes


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_a_copy_before_the_ranks_are_known_has_all_that_was_set(how: Any) -> None:
    module = small_model()
    first = TopQState(module, **OPTIONS)
    step_of(wrapped(first, module), sgd(module), 0)
    again = small_model()
    state = TopQState(again, **OPTIONS)
    state.q = 0.5
    state.load_state_dict(first.state_dict())
    state.observe()
    copied_module, copied = how((again, state))
    assert copied.q == 0.5
    step_of(wrapped(copied, copied_module), sgd(copied_module), 1)
    assert copied.stats().steps == 2
    assert any(one.metric is RESIDUAL_RATIO for one in copied.readings())


def test_a_copy_of_a_state_with_a_process_group_is_an_error() -> None:
    group = dist.new_group([0])
    state = TopQState(small_model(), process_group=group, **OPTIONS)
    with pytest.raises(RuntimeError, match=r"process_group.*cannot be copied"):
        copy.deepcopy(state)
