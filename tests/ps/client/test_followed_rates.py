"""The rates that a worker's residuals follow: of its own steps, where the server asks for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ps.client.test_optimizer import ADAMW, connect
from ps.servers import Options, serving
from ps.workers import backward, batch, make_model
from torch import nn

from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.planned_segments import PlannedSegments
from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.client.followed_rates import FollowedRates
from topq_dist.ps.client.param_groups import ServerGroups
from topq_dist.ps.client.replay_log import ReplayLog
from topq_dist.ps.client.shard import Shard, frames_of
from topq_dist.ps.client.worker_state import read_state
from topq_dist.ps.protocol.errors import InvalidError, NonFiniteError
from topq_dist.ps.protocol.types import START, GroupView, NewPush
from topq_dist.ps.server.process import ParameterServer

SGD: Options = {"inner_opt": "sgd", "options": {"lr": 0.1, "momentum": 0.9}}
SPARSELY: Options = {"q": 0.9, "value_format": None}


class Worker:
    """Residuals of ones of two parameters in two groups, and the rates that they follow."""

    def __init__(self, dtype: torch.dtype = torch.float32, **of_groups: Any) -> None:
        self.named = {name: nn.Parameter(torch.zeros(4, dtype=dtype)) for name in "ab"}
        compressor = TopKCompressor(value_format=None, error_feedback=True)
        compressor.residuals.load_state_dict({name: torch.ones(4) for name in "ab"})
        self.residuals = compressor.residuals
        numbers = {"lr": 1.0} | of_groups.pop("numbers", {})
        view = GroupView(names=("a",), numbers=numbers, **{"keeps_rate": True, **of_groups})
        groups = ServerGroups([[view, replace(view, names=("b",))]])
        self.groups = groups.param_groups(self.named)
        shard = Shard(self.named, compressor)
        self.shards = [shard]
        self.followed = FollowedRates(self.shards, groups, enabled=True)
        self.step()

    def step(self, **numbers: float) -> list[float]:
        """Change the first group's numbers; return what is left of each residual's ones."""
        self.groups[0].update(numbers)
        self.followed.follow(self.groups, [])
        return [float(held[0]) for held in self.residuals.state_dict().values()]


def test_a_rate_that_falls_raises_what_waits_of_its_group_alone() -> None:
    worker = Worker()
    assert worker.step(lr=0.5) == [2.0, 1.0]
    assert worker.step(lr=0.25) == [4.0, 1.0]
    # less than a twentieth is not worth a pass
    assert worker.step(lr=0.24) == [4.0, 1.0]
    assert worker.step(lr=1.0) == [1.0, 1.0]


def test_the_rate_is_that_of_the_step_without_momentum() -> None:
    numbers = {"momentum": 0.9, "dampening": 0.5}
    assert Worker(numbers=numbers).step(momentum=0.8) == [1.0, 1.0]
    # 1 * 0.5 / 0.1 = 5, and 1 * 0.5 / 0.2 = 2.5
    worker = Worker(numbers=numbers, sums_momentum=True)
    assert worker.step(momentum=0.8) == pytest.approx([2.0, 1.0])
    # a rate past all numbers is none
    assert worker.step(lr=1e308, momentum=0.99999) == pytest.approx([2.0, 1.0])


def test_what_the_server_does_not_ask_for_and_what_could_do_harm_is_left() -> None:
    assert Worker(keeps_rate=False).step(lr=0.5) == [1.0, 1.0]
    # Adam would take such arrivals into its mean
    worker = Worker(remembers_squares=True)
    assert worker.step(lr=0.5) == [1.0, 1.0]
    assert worker.step(lr=0.4) == pytest.approx([1.25, 1.0])
    # and a gradient in fp16 might overflow
    assert Worker(torch.float16).step(lr=0.9) == [1.0, 1.0]


def test_a_shard_whose_parameters_are_elsewhere_follows_later() -> None:
    worker = Worker()
    worker.groups[0]["lr"] = 0.5
    worker.followed.follow(worker.groups, worker.shards)
    assert float(worker.residuals.state_dict()["a"][0]) == 1.0
    assert worker.step() == [2.0, 1.0]


@pytest.mark.parametrize("training", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_server_tells_whether_its_steps_do_without_momentum(
    tmp_path: Path, training: Options
) -> None:
    # Adam's kind follows no sudden fall
    lower = 0.5 if training is SGD else 0.8
    for momentum, followed in (("feedback", True), ("optimizer", False)):
        told = {**training, "momentum": momentum}
        with serving(tmp_path / momentum, told) as server:
            for knobs in ({}, {"keep_rate": False}, {"error_feedback": False, "bound": None}):
                model = make_model()
                with connect(model, server, **SPARSELY, **knobs) as optimizer:
                    step(model, optimizer, 0)
                    waits = residuals(optimizer)
                    for group in optimizer.param_groups:
                        group["lr"] *= lower
                    optimizer.zero_grad()
                    # nothing new: what is not sent is what has waited
                    for parameter in model.parameters():
                        parameter.grad = torch.zeros_like(parameter)
                    optimizer.step()
                    left = residuals(optimizer)
                times = 1.0 / lower if followed and not knobs else 1.0
                for name, before in waits.items():
                    now = left[name]
                    kept = now != 0
                    torch.testing.assert_close(now[kept], times * before[kept], rtol=1e-6, atol=0)
                assert bool(waits) is ("error_feedback" not in knobs)


def step(model: nn.Module, optimizer: ParameterServerOptimizer, number: int) -> None:
    optimizer.zero_grad()
    backward(model, [batch(0, number)])
    optimizer.step()


@contextmanager
def stepped_once(
    model: nn.Module, server: ParameterServer
) -> Iterator[tuple[ParameterServerOptimizer, dict[str, Any]]]:
    """Give a worker that has taken one step, and its state then."""
    with connect(model, server, **SPARSELY) as optimizer:
        step(model, optimizer, 0)
        yield optimizer, copy.deepcopy(optimizer.state_dict())


def residuals(optimizer: ParameterServerOptimizer) -> dict[str, torch.Tensor]:
    return {
        name: held.clone()
        for server in optimizer.state_dict()["topq"]["servers"]
        for name, held in server["residuals"].items()
    }


@pytest.mark.parametrize("lr", [100.0, 2000.0, 1e-3])
def test_a_step_that_ends_before_anything_is_sent_leaves_what_waits_as_it_was(
    tmp_path: Path, lr: float
) -> None:
    """Residuals were counted at its rate from then on, though nothing ever ran at it."""
    model = make_model()
    with (
        serving(tmp_path, {**SGD, "options": {"lr": 0.1}}) as server,
        connect(model, server, **SPARSELY) as optimizer,
    ):
        for number in range(3):
            step(model, optimizer, number)
        (shard,) = optimizer._shards
        before, counted = residuals(optimizer), shard.rates.state()
        (group,) = optimizer.param_groups
        group["lr"] = lr
        weight = next(model.parameters())
        assert weight.grad is not None
        weight.grad.fill_(torch.nan)
        with pytest.raises(NonFiniteError):
            optimizer.step()
        assert shard.rates.state() == counted
        group["lr"] = 0.1
        for name, held in residuals(optimizer).items():
            torch.testing.assert_close(held, before[name])
        step(model, optimizer, 3)
        assert shard.rates.state() == counted


def test_rates_are_not_carried_through_a_run_that_does_not_follow_them(tmp_path: Path) -> None:
    with serving(tmp_path, SGD) as server:
        model = make_model()
        with stepped_once(model, server) as (optimizer, state):
            assert state["topq"]["servers"][0]["rates"]
        with connect(model, server, **SPARSELY, keep_rate=False) as optimizer:
            optimizer.load_state_dict(state)
            assert not optimizer.state_dict()["topq"]["servers"][0]["rates"]


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lr": 2000.0}, r"lr=2000.0: expected at most 20"),
        ({"lr": 21.0}, r"lr=21.0: expected at most 20"),
        ({"lr": 0.01, "weight_decay": 150.0}, "is a decay of 15 a step"),
    ],
    ids=["far", "a little", "below"],
)
def test_a_refused_rate_loses_nothing_of_what_waits(
    tmp_path: Path, wrong: dict[str, float], said: str, decay: float
) -> None:
    training = {"inner_opt": "sgd", "options": {"lr": 0.1}}
    with serving(tmp_path, training, max_lr=20.0) as server:
        model = make_model()
        with connect(model, server, **SPARSELY, residual_decay=decay) as optimizer:
            for number in range(3):
                step(model, optimizer, number)
            waits = residuals(optimizer)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            group = optimizer.param_groups[0]
            right = {name: group[name] for name in ("lr", "weight_decay")}
            group.update(wrong)
            with pytest.raises(InvalidError, match=said):
                optimizer.step()
            refused = residuals(optimizer)
            assert refused.keys() == waits.keys()
            for name, waited in waits.items():
                torch.testing.assert_close(refused[name], decay * waited, rtol=1e-5, atol=1e-6)
            group.update(right)
            optimizer.step()
            rates = optimizer.state_dict()["topq"]["servers"][0]["rates"]
            assert set(map(tuple, rates.values())) == {(0.1, 0.1, 0.1)}
            for name, left in residuals(optimizer).items():
                kept = left != 0
                torch.testing.assert_close(left[kept], decay * refused[name][kept])


def test_a_push_that_is_taken_back_counts_at_the_rate_it_was_made_at() -> None:
    worker = Worker()
    (shard,) = worker.shards
    worker.residuals.load_state_dict({name: torch.zeros(4) for name in "ab"})
    for parameter in worker.named.values():
        parameter.grad = torch.tensor([4.0, 3.0, 2.0, 1.0])
    made = shard.compress(PlannedSegments(0.75, "parameter", {"a": (4,), "b": (4,)}, "fp32"))
    counted_at = tuple(shard.rates.counted_at(shard.names))
    push = ReplayLog().begin(START, NewPush(frames=frames_of(made), counted_at=counted_at))
    for one in made:
        worker.residuals.apply(one.update)
    worker.step(lr=0.5)
    shard.restore_residual(push)
    held = worker.residuals.state_dict()
    assert held["a"].tolist() == [8.0, 6.0, 4.0, 2.0]
    assert held["b"].tolist() == [4.0, 3.0, 2.0, 1.0]
    # one of a state of before knows of no rates
    shard.restore_residual(replace(push, counted_at=()))
    assert worker.residuals.state_dict()["a"].tolist() == [12.0, 6.0, 4.0, 2.0]


def test_a_push_made_at_a_rate_of_nought_counts_as_what_waited_then() -> None:
    worker = Worker(numbers={"lr": 0.0})
    (shard,) = worker.shards
    for parameter in worker.named.values():
        parameter.grad = torch.tensor([4.0, 3.0, 2.0, 1.0])
    made = shard.compress(PlannedSegments(0.75, "parameter", {"a": (4,), "b": (4,)}, "fp32"))
    log = ReplayLog()
    counted_at = tuple(shard.rates.counted_at(shard.names))
    log.begin(START, NewPush(frames=frames_of(made), counted_at=counted_at))
    pending = ReplayLog.from_state(log.state_dict()).pending
    assert pending is not None
    for one in made:
        worker.residuals.apply(one.update)
    # of what came in at nought a twentieth counts; a second group stays there
    worker.step(lr=1.0)
    shard.restore_residual(pending)
    held = worker.residuals.state_dict()
    torch.testing.assert_close(held["a"], 0.05 * torch.tensor([5.0, 4.0, 3.0, 2.0]))
    assert held["b"].tolist() == [5.0, 4.0, 3.0, 2.0]
    # a state of before has 0 there, which says no more than that it may not be known
    shard.restore_residual(replace(pending, counted_at=(0.0, 0.0)))
    torch.testing.assert_close(
        worker.residuals.state_dict()["a"], held["a"] + torch.tensor([5.0, 0.0, 0.0, 0.0])
    )


def test_a_state_of_before_is_taken_up_and_rates_that_are_none_are_refused(tmp_path: Path) -> None:
    with serving(tmp_path, SGD) as server:
        model = make_model()
        with stepped_once(model, server) as (optimizer, state):
            assert state["topq"]["servers"][0]["rates"]["0.weight"] == pytest.approx(
                [1.0, 1.0, 1.0]
            )
            wrong = copy.deepcopy(state)
            wrong["topq"]["servers"][0]["rates"] = {"0.weight": [0.0, 1.0]}
            with pytest.raises(ValueError, match=r"rates\['0.weight'\]=\[0.0, 1.0\]"):
                optimizer.load_state_dict(wrong)
            del state["topq"]["servers"][0]["rates"]
            assert read_state(state, "w0", optimizer._shards).shards[0].rates == {}
            optimizer.load_state_dict(state)
            step(model, optimizer, 1)
    with pytest.raises(TypeError, match="keep_rate=1: expected True or False"):
        ParameterServerOptimizer(model.named_parameters(), "127.0.0.1:1", keep_rate=1)  # type: ignore[arg-type]
