"""Cases that a hook tells of, refuses and resumes, where it once did not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from topq_dist import TopQState, register_topq_hook


@pytest.fixture(autouse=True, scope="module")
def _alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Unknown(Optimizer):
    """One that nothing is known of."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99)})


def hooked(**options: Any) -> tuple[DistributedDataParallel, SGD, TopQState]:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(40, 5))
    optimizer = SGD(model.parameters(), lr=0.001)
    return model, optimizer, register_topq_hook(model, optimizer, **options)


def train(model: DistributedDataParallel, optimizer: SGD, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(3, 40, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step()


def residual_of(state: TopQState) -> float:
    return sum(float(one.abs().sum()) for one in state.state_dict()["residuals"].values())


def warned_here(make: Any, **options: Any) -> list[warnings.WarningMessage]:
    model = DistributedDataParallel(nn.Linear(4, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        register_topq_hook(model, make(model.parameters()), exchange="allgather", **options)
    return caught


@pytest.mark.parametrize(
    ("make", "options"),
    [(Unknown, {}), (lambda p: SGD(p, lr=0.1, momentum=0.9), {"momentum": "optimizer"})],
)
def test_a_warning_names_the_line_that_registers(make: Any, options: dict[str, Any]) -> None:
    first = warned_here.__code__.co_firstlineno
    (warning,) = warned_here(make, **options)
    assert first < warning.lineno <= first + 4
    assert warning.filename == __file__


def test_corrected_is_refused_where_the_optimizers_own_momentum_would_act_as_well() -> None:
    model = DistributedDataParallel(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"'corrected' with Unknown.*register_momentum_rule"):
        register_topq_hook(model, Unknown(model.parameters()), momentum="corrected")


@pytest.mark.parametrize("method", ["feedback", "corrected", "adam"])
def test_parameters_of_another_optimizer_are_named(
    method: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    optimizer = torch.optim.AdamW(model.module[0].parameters())
    register_topq_hook(model, optimizer, momentum=method, exchange="allgather")
    assert "holds 2 of 4 trainable parameters" in caplog.text
    assert "1.weight first" in caplog.text


def test_what_sparse_steps_leave_after_dense_ones_is_paid_in_shares() -> None:
    model, optimizer, state = hooked(exchange="dense")
    train(model, optimizer, 40)
    saved = state.state_dict()
    assert saved["dense_steps"] == 40
    model, optimizer, state = hooked(exchange="allgather")
    state.load_state_dict(saved)
    train(model, optimizer, 5)
    saved = state.state_dict()
    model, optimizer, state = hooked(exchange="dense")
    state.load_state_dict(saved)
    before = residual_of(state)
    train(model, optimizer, 1)
    assert 0 < residual_of(state) == pytest.approx(before * 31 / 32, rel=1e-5)


def test_what_is_dealt_out_anew_is_paid_in_shares() -> None:
    model, optimizer, state = hooked(exchange="allgather")
    train(model, optimizer, 5)
    saved = state.state_dict()
    model, optimizer, state = hooked(exchange="dense")
    train(model, optimizer, 40)
    state.load_state_dict([saved])
    before = residual_of(state)
    train(model, optimizer, 1)
    assert 0 < residual_of(state) == pytest.approx(before * 31 / 32, rel=1e-5)


def test_measuring_pays_nothing_whatever_was_sent_before() -> None:
    model, optimizer, state = hooked(exchange="allgather")
    train(model, optimizer, 5)
    saved = state.state_dict()
    model, optimizer, state = hooked(exchange="auto")
    state.load_state_dict(saved)
    before = residual_of(state)
    train(model, optimizer, 4)
    assert state.chosen_exchange is None
    assert state.state_dict()["dense_steps"] == 0
    assert residual_of(state) == before > 0
