"""Momentum that workers change, as schedules do: how it is sent, taken, kept and resumed."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ps.servers import Options, serving
from ps.training.momentum_cases import DENSE, SPARSE, central_of, connect, pushes_at
from ps.training.test_central import SINGLE, random_model, same_bits
from ps.workers import backward, batch, make_model, side_by_side, values
from server_process import ServerProcess
from torch import Tensor

from topq_dist.ps.client.param_groups import ServerGroups
from topq_dist.ps.client.replay_log import ReplayLog
from topq_dist.ps.protocol.config import GroupRule, TrainingConfig
from topq_dist.ps.protocol.errors import InvalidError, NonFiniteError
from topq_dist.ps.protocol.types import START, GroupView, NewPush, push_digest
from topq_dist.ps.training.central import CentralModel

pytestmark = pytest.mark.usefixtures("one_thread")


class TestMomentumFromWorkers:
    def test_the_median_of_the_pushes_that_have_it_sets_it(self) -> None:
        rules = (GroupRule(pattern="a.bias", options={"lr": 0.5}),)
        model = random_model(SINGLE)
        config = TrainingConfig(inner_opt="adamw", groups=rules)
        central = CentralModel(config, model.spec, model)
        (push,) = pushes_at(model, torch.Generator().manual_seed(8), DENSE)
        central.apply(
            [
                dataclasses.replace(push, lr=(0.1, 0.2)),
                dataclasses.replace(push, momentum=(0.85, 0.8)),
                dataclasses.replace(push, momentum=(0.1, 0.2)),
                dataclasses.replace(push, momentum=(0.9, 0.9)),
            ]
        )
        weight, bias = central.groups()
        assert (weight.betas, bias.betas) == ((0.85, 0.999), (0.8, 0.999))
        assert weight.takes_momentum
        assert bias.numbers["lr"] == 0.2

    @pytest.mark.parametrize(
        ("momentum", "error", "message"),
        [
            ((0.5, 0.5), InvalidError, "2 momenta: expected one for each of 1 groups"),
            ((1.0,), InvalidError, r"momentum=1.0: expected a number in \[0, 1\)"),
            ((-0.1,), InvalidError, r"momentum=-0.1: expected a number in \[0, 1\)"),
            ((float("nan"),), NonFiniteError, "momentum=nan: expected a finite number"),
        ],
    )
    def test_what_is_none_is_refused(
        self, momentum: tuple[float, ...], error: type[Exception], message: str
    ) -> None:
        model = random_model(SINGLE)
        (push,) = pushes_at(model, torch.Generator().manual_seed(9), DENSE)
        with pytest.raises(error, match=message):
            central_of("adamw", model).check_push(dataclasses.replace(push, momentum=momentum))

    def test_an_optimizer_without_any_takes_none(self) -> None:
        model = random_model(SINGLE)
        central = CentralModel(TrainingConfig(inner_opt="adagrad"), model.spec, model)
        (push,) = pushes_at(model, torch.Generator().manual_seed(9), DENSE)
        with pytest.raises(InvalidError, match="Adagrad has no momentum"):
            central.check_push(dataclasses.replace(push, momentum=(0.5,)))
        assert not central.groups()[0].takes_momentum

    def test_rmsprop_gets_the_buffers_that_it_began_without(self) -> None:
        model = random_model(SINGLE)
        config = TrainingConfig(inner_opt="rmsprop", options={"lr": 0.01})
        central = CentralModel(config, model.spec, model)
        (push,) = pushes_at(model, torch.Generator().manual_seed(10), DENSE)
        central.apply([push])
        before = model.clone()
        central.apply([dataclasses.replace(push, momentum=(0.5,))])
        assert not same_bits(before.flats[0], model.flats[0])

    def test_the_digest_without_it_is_what_it_was(self) -> None:
        frames = [memoryview(b"frame")]
        expected = hashlib.sha256(b"\0\0\0\0\0\0\xe0?" + b"frame").digest()
        assert push_digest((0.5,), frames) == expected
        assert push_digest((), frames, (0.5,)) != expected


class TestTheWorkersGroups:
    OLD = GroupView(names=("w",), numbers={"lr": 0.1, "momentum": 0.9})
    SGD = dataclasses.replace(OLD, takes_momentum=True)
    ADAM = GroupView(names=("w",), numbers={"lr": 0.1}, betas=(0.9, 0.999), takes_momentum=True)
    PLAIN = GroupView(names=("v",), numbers={"lr": 0.1})

    def test_send_all_once_one_was_changed(self) -> None:
        groups = ServerGroups([[self.SGD, self.SGD], [self.PLAIN], [self.SGD]])
        own: list[dict[str, Any]] = [{"momentum": 0.9}, {"momentum": 0.9}, {}, {"momentum": 0.9}]
        assert groups.momenta(own) == [(), (), ()]
        own[1] = {"momentum": 0.8}
        assert groups.momenta(own) == [(0.9, 0.8), (), (0.9,)]
        own[1] = {"momentum": 0.9}
        assert groups.momenta(own) == [(0.9, 0.9), (), (0.9,)]
        assert groups.defaults() == {}
        assert ServerGroups([[self.ADAM]]).defaults() == {"betas": (0.9, 0.999)}

    @pytest.mark.parametrize("value", [1.0, -0.5, float("nan")])
    def test_refuse_what_is_no_momentum(self, value: float) -> None:
        with pytest.raises(ValueError, match=r"momentum=.* in param_groups\[0\]: expected"):
            ServerGroups([[self.SGD]]).momenta([{"momentum": value}])
        with pytest.raises(ValueError, match=r"betas=.* in param_groups\[0\]: expected"):
            ServerGroups([[self.ADAM]]).momenta([{"betas": (value, 0.999)}])

    def test_refuse_another_beta2(self) -> None:
        with pytest.raises(ValueError, match=r"betas=\(0.9, 0.5\).*change lr and betas\[0\] alone"):
            ServerGroups([[self.ADAM]]).rates([{"lr": 0.1, "betas": (0.9, 0.5)}])

    def test_refuse_a_change_that_an_older_server_would_not_take(self) -> None:
        groups = ServerGroups([[self.OLD]])
        assert groups.momenta([{"lr": 0.1, "momentum": 0.9}]) == [()]
        with pytest.raises(ValueError, match=r"momentum=0.5 .* expected 0.9.*change lr alone"):
            groups.rates([{"lr": 0.1, "momentum": 0.5}])


ONE_CYCLE: dict[str, tuple[type[torch.optim.Optimizer], Options]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}


def one_cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.OneCycleLR:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=12)


@pytest.mark.parametrize("name", ONE_CYCLE)
def test_one_cycle_reaches_the_server(tmp_path: Path, name: str) -> None:
    cls, options = ONE_CYCLE[name]
    made: Any = cls
    alone, model = make_model(), make_model()
    reference = made(alone.parameters(), **options, fused=True)
    with (
        serving(tmp_path, {"inner_opt": name, "options": options}) as server,
        connect(model, server.address) as optimizer,
    ):
        schedulers = [one_cycle(each) for each in (reference, optimizer)]
        for step in range(10):
            for one, each in ((alone, reference), (model, optimizer)):
                each.zero_grad()
                backward(one, [batch(0, step)])
                each.step()
            for scheduler in schedulers:
                scheduler.step()
        assert torch.equal(values(model), values(alone))
        backward(model, [batch(0, 10)])
        optimizer.step()  # what the last change was goes with it
        group = reference.param_groups[0]
        run = server.coordinator._state
        assert run is not None
        (view,) = run.central.groups()
        assert view.numbers["lr"] == group["lr"]
        assert view.betas == tuple(group.get("betas", ()))
        assert view.numbers.get("momentum") == group.get("momentum")


def test_a_worker_that_cycles_momentum_resumes_on_the_same_path(tmp_path: Path) -> None:
    training: Options = {"inner_opt": "adamw", "options": {"lr": 0.01}}
    with serving(tmp_path, training) as server:
        model = make_model()
        optimizer = connect(model, server.address, q=SPARSE)
        scheduler = one_cycle(optimizer)
        steps(model, optimizer, scheduler, range(4))
        saved = copy.deepcopy([each.state_dict() for each in (model, optimizer, scheduler)])
        steps(model, optimizer, scheduler, range(4, 8))
        again = make_model()
        with connect(again, server.address, q=SPARSE) as resumed:
            scheduler = one_cycle(resumed)
            for each, state in zip((again, resumed, scheduler), saved, strict=True):
                each.load_state_dict(state)  # type: ignore[attr-defined]
            steps(again, resumed, scheduler, range(4, 8))
        assert torch.equal(values(again), values(model))
        assert server.coordinator.status().point.version == 8


def steps(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    which: range,
) -> None:
    for step in which:
        optimizer.zero_grad()
        backward(model, [batch(0, step)])
        optimizer.step()
        scheduler.step()


Between = Callable[[int, int], None]


def train(address: object, *, between: Between = lambda worker, step: None) -> list[Tensor]:
    """Return what two workers hold that cycle momentum, and push densely now and then."""

    def work(worker: int) -> Tensor:
        model = make_model()
        with connect(model, address, worker=f"w{worker}", timeout_s=40) as optimizer:
            scheduler = one_cycle(optimizer)
            for step in range(11):
                optimizer.q = DENSE if step in (0, 4, 5, 9) else SPARSE
                optimizer.zero_grad()
                backward(model, [batch(worker, step)])
                between(worker, step)
                optimizer.step()
                scheduler.step()
        return values(model)

    return side_by_side(2, work)


@pytest.mark.parametrize("name", ONE_CYCLE)
def test_a_server_killed_again_and_again_ends_in_the_same_bits(tmp_path: Path, name: str) -> None:
    training: Options = {"inner_opt": name, "options": ONE_CYCLE[name][1], "momentum": "feedback"}
    options: Options = {"start_workers": 2, "snapshot_every": 4}
    with serving(tmp_path / "undisturbed", training, **options) as server:
        expected, _ = train(server.address)
        sha256 = server.coordinator.status(state_sha256=True).state_sha256
    with ServerProcess(tmp_path / "killed", training, options) as process:

        def between(worker: int, step: int) -> None:
            if worker == 0 and step in (3, 6, 9):
                process.kill()
                process.start()

        first, second = train(process.address, between=between)
        process.terminate()
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    with serving(tmp_path / "killed", {**training, "momentum": None}, **options) as server:
        assert server.coordinator.status(state_sha256=True).state_sha256 == sha256


def test_a_workers_state_of_before_is_understood(tmp_path: Path) -> None:
    training: Options = {"inner_opt": "adamw", "options": {"lr": 0.01}}
    with serving(tmp_path, training) as server, connect(make_model(), server.address) as optimizer:
        state = optimizer.state_dict()
        for name in ("sends_momentum", "told_momentum"):
            del state["topq"][name]
        for group in state["param_groups"]:
            del group["betas"]
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
        optimizer.step()
        assert not optimizer.state_dict()["topq"]["sends_momentum"]


def test_kept_pushes_go_round_with_their_momentum() -> None:
    pushes = ReplayLog()
    made = pushes.begin(START, NewPush(frames=(memoryview(b"frame"),), lr=(0.1,), momentum=(0.9,)))
    state = pushes.state_dict()
    again = ReplayLog.from_state(state).pending
    assert again is not None
    assert (again.momentum, again.digest) == (made.momentum, made.digest)
    del state["pending"]["momentum"]
    old = ReplayLog.from_state(state).pending
    assert old is not None
    assert old.digest == push_digest((0.1,), [memoryview(b"frame")])
