"""Momentum of the server's inner optimizer, which is out of its steps while pushes are sparse."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ps.servers import Options
from ps.training.momentum_cases import (
    CASES,
    DENSE,
    SPARSE,
    central_of,
    gradients_of,
    pushes_at,
)
from ps.training.test_central import MIXED, SINGLE, Shapes, random_model, same_bits, spec_of

from topq_dist.compress.aggregate import write_sum
from topq_dist.optim.momentum_rules import SPARSE_BELOW
from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.protocol.types import START, Push, UpdateKind
from topq_dist.ps.training.step_guard import NonFiniteStepError

pytestmark = pytest.mark.usefixtures("one_thread")

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
