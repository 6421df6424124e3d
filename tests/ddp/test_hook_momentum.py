"""The momentum of the hook's optimizer: out of it while the exchange is sparse, and handed back."""

from __future__ import annotations

import copy
import gc
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp.momentum_hooks import (
    METHODS,
    PLAINLY,
    STEPS,
    Make,
    Q,
    adamw,
    assert_same,
    hooked,
    sgd,
    step_of,
    through_a_file,
    train,
)
from hook_cases import batch, loss_of, small_model
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import topq_dist.exchange.auto
from topq_dist import TopQGradientOptimizer, register_topq_hook

pytestmark = pytest.mark.gloo


def without_optimizer(make: Make, **options: Any) -> tuple[DistributedDataParallel, Optimizer]:
    model = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
    register_topq_hook(model, momentum="optimizer", **(PLAINLY | options))
    return model, make(model.parameters())


def values_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{n: v for n, v in g.items() if n != "params"} for g in optimizer.param_groups]


def taken_out(rank: int) -> bool:
    """With feedback, what an optimizer without momentum does; dense, what its own does."""
    cases: dict[str, tuple[Make, Make]] = {
        "SGD": (sgd, lambda p: SGD(p, lr=0.1 * (1 / (1 - 0.75)))),
        "nesterov": (
            lambda p: sgd(p, nesterov=True),
            lambda p: SGD(p, lr=0.1 * (1 / (1 - 0.75))),
        ),
        "AdamW": (adamw, lambda p: adamw(p, betas=(0.0, 0.999))),
        "wrapped": (
            lambda p: TopQGradientOptimizer(InnerOpt=sgd(p), params=None, q=0.8, param_ndim=None),
            lambda p: SGD(p, lr=0.1 * (1 / (1 - 0.75))),
        ),
    }
    for what, (make, without) in cases.items():
        model, optimizer, state = hooked(make, q=None if what == "wrapped" else Q)
        other, reference = without_optimizer(without, q=0.8 if what == "wrapped" else Q)
        schedules = [
            torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(one, T_0=3)
            for one in (optimizer, reference)
        ]
        before = values_of(optimizer)
        for step in range(STEPS):
            step_of(model, optimizer, step, rank)
            step_of(other, reference, step, rank)
            for schedule in schedules:
                schedule.step()
        assert_same(model, other, what)
        assert [g.keys() for g in before] == [g.keys() for g in values_of(optimizer)]
        for name in ("momentum", "betas"):
            assert optimizer.param_groups[0].get(name) == before[0].get(name)
        saved = optimizer.state_dict()["param_groups"][0]
        assert saved.get("momentum") in (0.75, None)
        assert saved.get("betas") in ((0.9, 0.999), None)
        assert state.state_dict()["momentum"]["method"] == "feedback"
    for options in ({"exchange": "dense"}, {"q": 0.0}, {"q": 0.4}, {"error_feedback": False}):
        model, optimizer, _ = hooked(sgd, **options)
        other, reference = without_optimizer(sgd, **options)
        train(model, optimizer, rank)
        train(other, reference, rank)
        assert_same(model, other, str(options))
    return True


def sharded(rank: int) -> bool:
    """ZeroRedundancyOptimizer, whose shards step on one rank each."""
    with warnings.catch_warnings():
        # of torch's own, where it is imported
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    for method, kind, options in (
        ("feedback", SGD, {"lr": 0.1, "momentum": 0.75}),
        ("corrected", SGD, {"lr": 0.1, "momentum": 0.75}),
        ("adam", AdamW, {"lr": 0.01}),
    ):
        model, optimizer, _ = hooked(
            lambda p, kind=kind, options=options: ZeroRedundancyOptimizer(p, kind, **options),  # type: ignore[misc]
            momentum=method,
        )
        other, reference, _ = hooked(
            lambda p, kind=kind, options=options: kind(p, **options),  # type: ignore[misc]
            momentum=method,
        )
        train(model, optimizer, rank)
        train(other, reference, rank)
        assert_same(model, other, method)
        assert optimizer.param_groups[0]["lr"] == options["lr"]
    return True


def handed_over(rank: int) -> bool:
    """The steps at which the exchange changes from sparse to dense, and the hook is taken off."""
    model, optimizer, state = hooked(sgd)
    train(model, optimizer, rank)
    assert all("momentum_buffer" not in s for s in optimizer.state.values())
    state.detach()
    state.detach()
    for step in range(3):
        step_of(model, optimizer, step, rank)
        first = model.module[0].weight
        assert first.grad is not None
        if step == 0:
            assert torch.equal(optimizer.state[first]["momentum_buffer"], first.grad)
    # a schedule of q
    model, optimizer, state = hooked(sgd, q=0.0)
    for step, q in enumerate((0.0, 0.3, 0.9, 0.99, 0.2)):
        state.q = q
        step_of(model, optimizer, step, rank)
        has = ["momentum_buffer" in s for s in optimizer.state.values()]
        assert has == [q < 0.5] * 6 or (q >= 0.5 and not any(has)), (q, has)
    # a model that is wrapped anew without a hook, while the state is still held by somebody
    model, optimizer, state = hooked(sgd)
    train(model, optimizer, rank)
    plain = DistributedDataParallel(copy.deepcopy(model.module))
    reference = sgd(plain.parameters())
    bare = DistributedDataParallel(model.module)
    for step in range(3):
        step_of(bare, optimizer, step, rank)
        step_of(plain, reference, step, rank)
        assert_same(bare, plain, f"wrapped anew, step {step}")
    step_of(model, optimizer, 3, rank)
    assert all("momentum_buffer" not in s for s in optimizer.state.values())
    # the state and the model gone, the optimizer is as it was
    model, optimizer, state = hooked(sgd)
    train(model, optimizer, rank)
    module = model.module
    del model, state
    gc.collect()
    optimizer.zero_grad()
    loss_of(module, 0, rank).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert all("momentum_buffer" in s for s in optimizer.state.values())
    # and a new hook on the same module and optimizer takes it out again
    again = DistributedDataParallel(module)
    register_topq_hook(again, optimizer, q=Q, exchange="allgather")
    train(again, optimizer, rank)
    assert all("momentum_buffer" not in s for s in optimizer.state.values())
    return True


def auto_leaves_the_momentum(rank: int) -> bool:
    topq_dist.exchange.auto._cheapest = lambda costs: "dense"
    for method in METHODS[:3]:
        make = adamw if method == "adam" else sgd
        model, optimizer, state = hooked(make, exchange="auto", momentum=method)
        switch: Any = state._parts.stages.momentum
        for step in range(44):
            step_of(model, optimizer, step, rank)
            # not while it measures, nor later
            assert not switch._switch.active
        assert state.chosen_exchange == "dense"
        assert not state._parts.stages.momentum.state_dict().get("velocity")
        saved = state.state_dict()
        # as from now on
        other, reference, resumed = hooked(make, exchange="auto", momentum=method)
        other.load_state_dict(model.state_dict())
        reference.load_state_dict(optimizer.state_dict())
        resumed.load_state_dict(through_a_file(saved))
        train(other, reference, rank)
        switch = resumed._parts.stages.momentum
        assert not switch._switch.active
        for parameter in other.parameters():
            held = reference.state[parameter]["exp_avg" if method == "adam" else "momentum_buffer"]
            assert bool(held.any())
            assert bool(parameter.isfinite().all())
    return True


def taken_out_of_shards_too(rank: int) -> bool:
    return taken_out(rank) and sharded(rank)


def test_feedback_takes_the_momentum_out_while_the_exchange_is_sparse(tmp_path: Path) -> None:
    assert run_ranks(2, taken_out_of_shards_too, tmp_path) == [True, True]


def test_the_optimizer_is_handed_back(tmp_path: Path) -> None:
    assert run_ranks(2, handed_over, tmp_path) == [True, True]


def test_auto_measuring_and_choosing_dense_leaves_the_momentum(tmp_path: Path) -> None:
    assert run_ranks(2, auto_leaves_the_momentum, tmp_path) == [True, True]


class Sometimes(nn.Module):
    """Has a layer that is out of use in odd steps."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = small_model(), nn.Linear(5, 5)

    def forward(self, inputs: Tensor, odd: bool) -> Tensor:
        out: Tensor = self.always(inputs)
        return out if odd else self.sometimes(out)


def out_of_use(rank: int) -> bool:
    for method in ("corrected", "adam"):
        torch.manual_seed(0)
        model = DistributedDataParallel(Sometimes(), find_unused_parameters=True)
        optimizer = adamw(model.parameters())
        state = register_topq_hook(model, optimizer, q=Q, momentum=method, exchange="allgather")
        key = "velocity" if method == "corrected" else "first"
        for step in range(4):
            before = state.state_dict()
            optimizer.zero_grad()
            inputs, targets = batch(step, rank)
            loss = nn.functional.cross_entropy(model(inputs, step % 2 == 1), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            after = state.state_dict()
            if step % 2:
                name = "sometimes.weight"
                assert torch.equal(before["momentum"][key][name], after["momentum"][key][name])
                assert torch.equal(before["residuals"][name], after["residuals"][name])
    return True


class Inverting(Optimizer):
    """One that nothing is known of."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99)})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param -= group["lr"] * group["betas"][0] * param.grad


def what_is_said(rank: int) -> list[list[str]]:
    said: list[list[str]] = []
    records: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    logging.getLogger("topq_dist").addHandler(Listening())
    cases: list[tuple[Make | None, dict[str, Any]]] = [
        (Inverting, {}),
        (sgd, {"momentum": "optimizer"}),
        (None, {}),
        (None, {"momentum": "optimizer"}),
        (None, {"error_feedback": False}),
        (lambda p: SGD(p, lr=0.1), {"momentum": "optimizer"}),
        (sgd, {"momentum": "optimizer", "error_feedback": False}),
        (sgd, {}),
    ]
    for make, options in cases:
        records.clear()
        model = DistributedDataParallel(small_model())
        optimizer = None if make is None else make(model.parameters())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            register_topq_hook(model, optimizer, q=Q, exchange="allgather", **options)
            if optimizer is not None:
                train(model, optimizer, rank, 0, 1)
        assert all(warning.filename == __file__ for warning in caught)
        said.append([*(str(warning.message) for warning in caught), *records])
    return said


def unused_and_said(rank: int) -> list[list[str]]:
    assert out_of_use(rank)
    return what_is_said(rank)


def test_what_cannot_be_taken_out_is_said_once(tmp_path: Path) -> None:
    for rank, said in enumerate(run_ranks(2, unused_and_said, tmp_path)):
        unknown, own, nothing, *silent = said
        assert len(unknown) == len(own) == 1
        assert "Inverting" in unknown[0]
        assert "register_momentum_rule" in unknown[0]
        assert "SGD has a momentum" in own[0]
        assert len(nothing) == (rank == 0)
        if rank == 0:
            for part in ("optimizer=", "momentum=0", "1 - momentum", "beta1=0"):
                assert part in nothing[0]
        assert silent == [[]] * len(silent)
