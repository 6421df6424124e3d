"""Momentum behind sparse pushes, and workers' schedules of it.

data/before_momentum.safetensors was saved by the last version that knew nothing of it: `SINGLE` of
test_central.py, SGD with momentum .9, after three sparse pushes.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ps.servers import Options, serving
from ps.training.test_central import (
    MIXED,
    SINGLE,
    Shapes,
    push_of,
    random_gradients,
    random_model,
    same_bits,
    spec_of,
)
from ps.workers import backward, batch, make_model, side_by_side, values
from server_process import ServerProcess
from torch import Tensor

from topq_dist.compress.aggregate import write_sum
from topq_dist.optim.momentum_rules import SPARSE_BELOW
from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.client.param_groups import ServerGroups
from topq_dist.ps.client.replay_log import ReplayLog
from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.protocol.config import GroupRule, ServingConfig, TrainingConfig
from topq_dist.ps.protocol.errors import InvalidError, NonFiniteError
from topq_dist.ps.protocol.types import START, GroupView, Push, UpdateKind, push_digest
from topq_dist.ps.server.coordinator import Coordinator
from topq_dist.ps.state.run_state import RunState
from topq_dist.ps.state.snapshot_file import StateError
from topq_dist.ps.state.state_dir import StateDir
from topq_dist.ps.training.central import CentralModel
from topq_dist.ps.training.inner_step import describe_momentum
from topq_dist.ps.training.step_guard import NonFiniteStepError

pytestmark = pytest.mark.usefixtures("one_thread")

OLD_SNAPSHOT = Path(__file__).parents[1] / "data" / "before_momentum.safetensors"
OLD_SHA256 = "8951b138c396435f89c295168a55dbeaf866c235978f5a721fc758d992eff68b"
SPARSE, DENSE = 0.9, 0.0  # q of a step's pushes

SGD: Options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.25}
NESTEROV: Options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
# by inner optimizer and its options: what it is to step with while pushes are sparse
CASES: dict[str, tuple[type[torch.optim.Optimizer], Options, Options]] = {
    "sgd": (torch.optim.SGD, SGD, {"lr": 0.1 * ((1 - 0.25) / (1 - 0.9)), "momentum": 0.0}),
    "nesterov": (
        torch.optim.SGD,
        NESTEROV,
        {"lr": 0.1 * (1 / (1 - 0.9)), "momentum": 0.0, "nesterov": False},
    ),
    "rmsprop": (
        torch.optim.RMSprop,
        {"lr": 0.01, "momentum": 0.5},
        {"lr": 0.01 * (1 / (1 - 0.5)), "momentum": 0.0},
    ),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}, {"betas": (0.0, 0.999)}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01, "betas": (0.8, 0.99)}, {"betas": (0.0, 0.99)}),
    "adamax": (torch.optim.Adamax, {"lr": 0.01}, {"betas": (0.0, 0.999)}),
}
PATTERNS: dict[str, list[float]] = {
    "sparse": [SPARSE] * 6,
    "dense": [DENSE] * 6,
    "mixed": [DENSE, DENSE, SPARSE, SPARSE, DENSE, DENSE, SPARSE, DENSE],
    "mixed, sparse first": [SPARSE, DENSE, DENSE, SPARSE, DENSE],
}


class Reference:
    """One process that takes the same steps with torch's own optimizer."""

    def __init__(self, case: str, model: FlatModel) -> None:
        cls, options, self._without = CASES[case]
        self.model = model.clone()
        self._tensors = self.model.tensors()
        fused = case in ("sgd", "nesterov", "adamw") and model.spec == spec_of(SINGLE)
        kernels: Options = {"fused" if fused else "foreach": True}
        self._optimizer: Any = cls(list(self._tensors.values()), **options, **kernels)
        self._was_sparse = False

    def step(self, pushes: Sequence[Push], *, sparse: bool) -> None:
        gradient = FlatModel(self.model.spec)
        for place, flat in enumerate(gradient.flats):
            write_sum([push.frames[place] for push in pushes], divisor=len(pushes), out=flat)
        for name, tensor in gradient.tensors().items():
            self._tensors[name].grad = tensor
        group = self._optimizer.param_groups[0]
        own = {name: group[name] for name in self._without}
        if sparse:
            group.update(self._without)
        if sparse != self._was_sparse:
            self._begin_momentum_anew()
        self._optimizer.step()
        group.update(own)
        if isinstance(self._optimizer, torch.optim.RMSprop):
            for tensor, state in self._optimizer.state.items():
                state.setdefault("momentum_buffer", torch.zeros_like(tensor))
        self._was_sparse = sparse

    def _begin_momentum_anew(self) -> None:
        for state in self._optimizer.state.values():
            for key in state.keys() & {"momentum_buffer", "exp_avg"}:
                state[key].zero_()
            if isinstance(self._optimizer, torch.optim.SGD):
                state.pop("momentum_buffer", None)


def central_of(case: str, model: FlatModel, **training: Any) -> CentralModel:
    cls, options, _ = CASES[case]
    config = TrainingConfig(inner_opt=cls.__name__, options=options, **training)
    return CentralModel(config, model.spec, model)


def pushes_at(model: FlatModel, generator: torch.Generator, *qs: float) -> list[Push]:
    return [push_of(model, random_gradients(model, generator), q=q) for q in qs]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("case", CASES)
def test_sparse_steps_have_the_bits_of_torchs_without_momentum_and_dense_ones_with(
    case: str, pattern: str
) -> None:
    model = random_model(SINGLE)
    reference, central = Reference(case, model), central_of(case, model)
    generator = torch.Generator().manual_seed(1)
    for step, q in enumerate(PATTERNS[pattern]):
        pushes = pushes_at(model, generator, q, q)
        sha256 = central.sha256()
        tensors, metadata = central.state()
        central.apply(pushes)
        # and the same from what a snapshot would have held
        other = random_model(SINGLE, seed=9)
        resumed = central_of(case, other)
        resumed.load_state(tensors, json.loads(json.dumps(metadata)))
        assert resumed.sha256() == sha256
        resumed.apply(pushes)
        assert resumed.sha256() == central.sha256()
        # last: the sum is made in the frames' own memory
        reference.step(pushes, sparse=q == SPARSE)
        assert all(map(same_bits, model.flats, reference.model.flats)), step


@pytest.mark.parametrize("case", CASES)
def test_left_in_the_optimizer_it_is_as_it_was(case: str) -> None:
    model = random_model(SINGLE)
    reference = Reference(case, model)
    central = central_of(case, model, momentum="optimizer")
    generator = torch.Generator().manual_seed(2)
    for q in PATTERNS["mixed"]:
        pushes = pushes_at(model, generator, q, q)
        central.apply(pushes)
        reference.step(pushes, sparse=False)
        assert all(map(same_bits, model.flats, reference.model.flats))


@pytest.mark.parametrize("shapes", [SINGLE, MIXED])
def test_sgd_whose_momentum_is_out_steps_at_the_few_elements_alone(shapes: Shapes) -> None:
    model = random_model(shapes)
    reference, central = Reference("sgd", model), central_of("sgd", model)
    whole_steps: list[object] = []
    central._inner.register_step_post_hook(lambda *_: whole_steps.append(_))
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        pushes = pushes_at(model, generator, 0.97, 0.97)
        central.apply(pushes)
        reference.step(pushes, sparse=True)
        assert all(map(same_bits, model.flats, reference.model.flats))
    # in half precision torch takes the step, and what has changed is read where it can have
    assert len(whole_steps) == (4 if shapes is MIXED else 0)
    kind, _ = central.apply(pushes_at(model, generator, 0.97))
    assert kind is UpdateKind.SET


def test_schedules_of_rate_and_momentum_are_followed_while_it_is_out() -> None:
    model = random_model(SINGLE)
    alone, central = model.clone(), central_of("sgd", model)
    tensors = alone.tensors()
    plain = torch.optim.SGD(list(tensors.values()), lr=1.0, fused=True)
    generator = torch.Generator().manual_seed(13)
    for lr, momentum in [(0.1, 0.95), (0.3, 0.85), (0.2, 0.0), (0.2, 0.9)]:
        (push,) = pushes_at(model, generator, SPARSE)
        central.apply([dataclasses.replace(push, lr=(lr,), momentum=(momentum,))])
        plain.param_groups[0]["lr"] = lr * ((1 - 0.25) / (1 - momentum)) if momentum else lr
        for name, gradient in gradients_of(push, model).items():
            tensors[name].grad = gradient
        plain.step()
        assert all(map(same_bits, model.flats, alone.flats))


def test_the_mean_over_the_counted_pushes_decides() -> None:
    model = random_model(SINGLE)
    central = central_of("sgd", model)
    generator = torch.Generator().manual_seed(4)
    void = Push(worker="v", epoch=1, sequence=1, base=START, frames=(), lr=(), digest=b"")

    def has_buffers() -> bool:
        return any("momentum_buffer" in key for key in central.state()[0])

    for qs, dense in [((0.0, 0.9), True), ((0.2, 0.9), False), ((0.4,), True), ((0.6,), False)]:
        central.apply([void, *pushes_at(model, generator, *qs), void])
        assert has_buffers() == dense
        assert dense == (sum(1 - q for q in qs) / len(qs) >= SPARSE_BELOW)
        central.apply([void])
        assert has_buffers() == dense


@pytest.mark.parametrize("raises", [False, True])
def test_the_groups_hold_the_users_values_after_each_step(
    raises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def step(self: torch.optim.Optimizer, closure: object = None) -> None:
        seen.append(self.param_groups[0]["betas"])
        if raises:
            raise RuntimeError("in the middle of it")

    model = random_model(SINGLE)
    central = central_of("adamw", model)
    monkeypatch.setattr(type(central._inner), "step", step)
    pushes = pushes_at(model, torch.Generator().manual_seed(5), SPARSE)
    if raises:
        with pytest.raises(RuntimeError, match="in the middle"):
            central.apply(pushes)
    else:
        central.apply(pushes)
    assert seen == [(0.0, 0.999)]
    assert central.state()[1]["inner"]["groups"][0]["betas"] == (0.9, 0.999)
    (group,) = central.groups()
    assert group.betas == (0.9, 0.999)


def test_a_rate_that_overflows_without_momentum_does_not_end_the_server() -> None:
    model = random_model(SINGLE)
    central = central_of("sgd", model)
    (push,) = pushes_at(model, torch.Generator().manual_seed(6), SPARSE)
    sha256 = central.sha256()
    with pytest.raises(NonFiniteStepError, match="the pushes of w is not finite"):
        central.apply([dataclasses.replace(push, lr=(1.7e308,))])
    assert central.sha256() == sha256
    central.apply([push])


def test_a_broken_flag_is_refused() -> None:
    model = random_model(SINGLE)
    central = central_of("adamw", model)
    central.apply(pushes_at(model, torch.Generator().manual_seed(7), SPARSE))
    tensors, metadata = central.state()
    assert metadata["momentum_out"] is True
    with pytest.raises(ValueError, match="momentum_out='yes'"):
        central.load_state(tensors, {**metadata, "momentum_out": "yes"})


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


def connect(model: torch.nn.Module, address: object, **knobs: Any) -> ParameterServerOptimizer:
    exact = {"q": 0.0, "value_format": None, "bound": None}
    knobs = {**exact, "worker": "w0", "timeout_s": 30, **knobs}
    return ParameterServerOptimizer(model.named_parameters(), str(address), **knobs)


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
    made = pushes.begin(START, [memoryview(b"frame")], (0.1,), (0.9,))
    state = pushes.state_dict()
    again = ReplayLog.from_state(state).pending
    assert again is not None
    assert (again.momentum, again.digest) == (made.momentum, made.digest)
    del state["pending"]["momentum"]
    old = ReplayLog.from_state(state).pending
    assert old is not None
    assert old.digest == push_digest((0.1,), [memoryview(b"frame")])


OF_BEFORE: Options = {"inner_opt": "sgd", "options": {"lr": 0.1, "momentum": 0.9}}


class TestSnapshots:
    @staticmethod
    def old_folder(tmp_path: Path) -> Path:
        shutil.copy(OLD_SNAPSHOT, tmp_path / "snapshot.safetensors")
        return tmp_path

    @pytest.mark.parametrize("momentum", [None, "optimizer"])
    def test_of_before_go_on_as_they_were(self, tmp_path: Path, momentum: Any) -> None:
        training = TrainingConfig(**OF_BEFORE, momentum=momentum)
        with StateDir(self.old_folder(tmp_path)) as folder:
            loaded = RunState.load(folder, training, history_bytes=0)
            assert loaded is not None
            state, _ = loaded
            assert state.sha256() == OLD_SHA256
            assert state.training.momentum == "optimizer"
            tensors, _ = state.central.state()
            model = FlatModel(spec_of(SINGLE))
            model.flats[0].copy_(tensors["model.0"])
            named = model.tensors()
            alone: Any = torch.optim.SGD(list(named.values()), lr=0.1, momentum=0.9, fused=True)
            for place, tensor in enumerate(named.values()):
                alone.state[tensor]["momentum_buffer"] = tensors[f"inner.{place}.momentum_buffer"]
            generator = torch.Generator().manual_seed(11)
            for sequence in (4, 5, 6):
                (push,) = pushes_at(model, generator, SPARSE)
                for name, tensor in gradients_of(push, model).items():
                    named[name].grad = tensor
                state.apply([dataclasses.replace(push, sequence=sequence, digest=bytes(32))])
                alone.step()
            assert state.central.central_raw() == model.raw()
            folder.save(state.snapshot(["w"]))
            again = RunState.load(folder, TrainingConfig(**OF_BEFORE), history_bytes=0)
            assert again is not None
            assert again[0].sha256() == state.sha256()

    def test_that_disagree_are_refused_with_the_remedy(self, tmp_path: Path) -> None:
        training = TrainingConfig(**OF_BEFORE, momentum="feedback")
        with (
            StateDir(self.old_folder(tmp_path)) as folder,
            pytest.raises(StateError, match="momentum is 'feedback', and 'optimizer' in the snaps"),
        ):
            RunState.load(folder, training, history_bytes=0)

    def test_of_a_new_run_say_feedback(self, tmp_path: Path) -> None:
        with serving(tmp_path, OF_BEFORE) as server, connect(make_model(), server.address):
            assert server.coordinator.training.momentum == "feedback"
        with serving(tmp_path, {**OF_BEFORE, "momentum": "feedback"}):
            pass
        with (
            pytest.raises(StateError, match="momentum is 'optimizer', and 'feedback' in the snaps"),
            serving(tmp_path, {**OF_BEFORE, "momentum": "optimizer"}),
        ):
            pass


def gradients_of(push: Push, model: FlatModel) -> dict[str, Tensor]:
    gradient = FlatModel(model.spec)
    for place, flat in enumerate(gradient.flats):
        write_sum([push.frames[place]], divisor=1, out=flat)
    return gradient.tensors()


WHILE_SPARSE = "feedback: while pushes hold less than 50% of the elements"
RULES = (GroupRule(pattern="*.bias", options={"momentum": 0.5}),)


class TestWhatIsSaid:
    @pytest.mark.parametrize(
        ("training", "text", "warns"),
        [
            (
                {"inner_opt": "sgd", "options": {"lr": 0.1, "momentum": 0.9}},
                f"{WHILE_SPARSE}, SGD steps with momentum=0 for 0.9, lr=1 for 0.1",
                False,
            ),
            (
                {"inner_opt": "sgd", "options": {"lr": 0.1}, "groups": RULES},
                f"{WHILE_SPARSE}, SGD steps with '*.bias': momentum=0 for 0.5, lr=0.2 for 0.1",
                False,
            ),
            (
                {"inner_opt": "adamw"},
                (
                    f"{WHILE_SPARSE}, AdamW steps with betas=(0, 0.999) for (0.9, 0.999), at a rate"
                    " that is raised where gradients agree over steps"
                ),
                False,
            ),
            (
                {"inner_opt": "sgd"},
                f"{WHILE_SPARSE}, SGD steps with momentum from workers taken out",
                False,
            ),
            ({"inner_opt": "adagrad"}, "feedback: Adagrad has none", False),
            (
                {"inner_opt": "adam", "momentum": "optimizer"},
                "optimizer: Adam keeps its own, however sparse pushes are",
                True,
            ),
        ],
    )
    def test_names_the_numbers(self, training: Options, text: str, warns: bool) -> None:
        assert describe_momentum(TrainingConfig(**training)) == (text, warns)

    def test_of_a_class_that_is_not_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("topq_dist.ps.training.inner_step.momentum_rule", lambda _: None)
        text, warns = describe_momentum(TrainingConfig(inner_opt="muon"))
        assert text == "feedback: how Muon steps without is not known, so it keeps its own"
        assert warns
        model = random_model(SINGLE)
        central_of("adamw", model).apply(
            pushes_at(model, torch.Generator().manual_seed(12), SPARSE)
        )

    @pytest.mark.parametrize(
        ("given", "level"), [(None, logging.WARNING), ("optimizer", logging.INFO)]
    )
    def test_at_the_start_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, given: Any, level: int
    ) -> None:
        folder = TestSnapshots.old_folder(tmp_path)
        with caplog.at_level(logging.INFO), StateDir(folder) as state_dir:
            training = TrainingConfig(**OF_BEFORE, momentum=given)
            coordinator = Coordinator(training, ServingConfig(), state_dir)
            coordinator.drain()
        said = [r for r in caplog.records if r.getMessage().startswith("momentum: ")]
        assert [(r.levelno, r.getMessage()) for r in said] == [
            (level, "momentum: optimizer: SGD keeps its own, however sparse pushes are")
        ]

    def test_a_momentum_that_cannot_be_taken_out_is_refused_at_the_start(
        self, tmp_path: Path
    ) -> None:
        training = TrainingConfig(inner_opt="sgd", options={"momentum": 1.0})
        with (
            StateDir(tmp_path) as folder,
            pytest.raises(
                ValueError, match=r"inner_opt='sgd' with momentum=1\.0: expected a number"
            ),
        ):
            Coordinator(training, ServingConfig(), folder)
