"""The momentum of the hook: out of the optimizer while the exchange is sparse, and on the rank."""

from __future__ import annotations

import copy
import gc
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hook_cases import batch, keep_top, loss_of, small_model
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer

import topq_dist.exchange.auto
from topq_dist import TopQGradientOptimizer, TopQState, register_topq_hook
from topq_dist.hook.momentum import MomentumName
from topq_dist.sparsity import at_least_one

pytestmark = pytest.mark.gloo
Q = 0.9
STEPS = 6
METHODS: tuple[MomentumName, ...] = ("feedback", "corrected", "adam", "optimizer")
PLAINLY: dict[str, Any] = {
    "q": Q,
    "exchange": "allgather",
    "value_format": None,
    "bound": None,
    "adapt_rate": False,
}
Make = Callable[[Any], Optimizer]


def sgd(parameters: Any, **options: Any) -> Optimizer:
    return SGD(parameters, **({"lr": 0.1, "momentum": 0.75} | options))


def adamw(parameters: Any, **options: Any) -> Optimizer:
    return AdamW(parameters, **({"lr": 0.01, "weight_decay": 0.1} | options))


def hooked(make: Make, **options: Any) -> tuple[DistributedDataParallel, Optimizer, TopQState]:
    """Return a model of several buckets, optimizer and hook; q, fp32, no bound, all-gather."""
    model = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
    optimizer = make(model.parameters())
    options = PLAINLY | options
    with warnings.catch_warnings():
        if options.get("momentum") == "optimizer":
            warnings.simplefilter("ignore")
        return model, optimizer, register_topq_hook(model, optimizer, **options)


def without_optimizer(make: Make, **options: Any) -> tuple[DistributedDataParallel, Optimizer]:
    model = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
    register_topq_hook(model, momentum="optimizer", **(PLAINLY | options))
    return model, make(model.parameters())


def step_of(model: nn.Module, optimizer: Optimizer, step: int, rank: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def train(model: nn.Module, optimizer: Optimizer, rank: int, *steps: int) -> None:
    for step in steps or range(STEPS):
        step_of(model, optimizer, step, rank)


def assert_same(one: nn.Module, other: nn.Module, what: str) -> None:
    for (name, left), right in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right), (what, name, (left - right).detach().abs().max())


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


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(rank: int) -> bool:
    for method in METHODS:
        for make in (adamw,) if method == "adam" else (sgd, adamw):
            model, optimizer, state = hooked(make, momentum=method, adapt_rate=True)
            train(model, optimizer, rank, *range(4))
            saved = through_a_file(
                {"hook": state.state_dict(), "optimizer": optimizer.state_dict()}
            )
            other, reference, resuming = hooked(make, momentum=method, adapt_rate=True)
            other.load_state_dict(model.state_dict())
            reference.load_state_dict(saved["optimizer"])
            resuming.load_state_dict(saved["hook"])
            for one, stepping in ((model, optimizer), (other, reference)):
                train(one, stepping, rank, *range(4, 8))
            assert_same(model, other, f"{method} {make.__name__}")
            again, before = resuming.state_dict(), state.state_dict()
            for name, residual in before["residuals"].items():
                assert torch.equal(residual, again["residuals"][name])
    return True


def refused_states(rank: int) -> bool:
    corrected, own_adam = (hooked(adamw, momentum=method) for method in ("corrected", "adam"))
    feedback = hooked(adamw)
    for model, optimizer, _ in (corrected, own_adam, feedback):
        train(model, optimizer, rank, 0, 1)
    states: dict[str, dict[str, Any]] = {
        method: kind[2].state_dict()
        for method, kind in zip(METHODS[:3], (feedback, corrected, own_adam), strict=True)
    }
    # an older hook's state, and the plain method's
    for kind in (feedback, corrected):
        old = {key: value for key, value in states["feedback"].items() if key != "momentum"}
        kind[2].load_state_dict(old)
        kind[2].load_state_dict(states["feedback"])
        assert kind[2].state_dict()["momentum"]["unit"] == "gradient"
        train(kind[0], kind[1], rank, 2, 3)
    name = next(iter(states["corrected"]["residuals"]))
    bad = [
        (feedback, states["corrected"]),
        (feedback, states["adam"]),
        (corrected, states["adam"]),
        (own_adam, states["feedback"]),
        (own_adam, states["corrected"]),
        (feedback, states["feedback"] | {"momentum": 3}),
    ]
    for wrong_sums in (None, [1.0], [1.0, -1.0], [float("nan"), 1.0], ["much", "little"]):
        momentum = states["feedback"]["momentum"] | {"coherence": wrong_sums}
        bad.append((feedback, states["feedback"] | {"momentum": momentum}))
    for state, key in (("corrected", "velocity"), ("adam", "first"), ("adam", "steps")):
        kind = corrected if state == "corrected" else own_adam
        for wrong in (None, {name: torch.zeros(1)}, {"nowhere": torch.zeros(1)}, {name: "much"}):
            momentum = states[state]["momentum"] | {key: wrong}
            bad.append((kind, states[state] | {"momentum": momentum}))
    for kind, wrong_state in bad:
        before = kind[2].state_dict()
        with pytest.raises((TypeError, ValueError), match="expected"):
            kind[2].load_state_dict(wrong_state)
        after = kind[2].state_dict()
        assert before["momentum"].keys() == after["momentum"].keys()
        for one, other in zip(
            before["residuals"].values(), after["residuals"].values(), strict=True
        ):
            assert torch.equal(one, other)
    return True


def taken_out_of_shards_too(rank: int) -> bool:
    return taken_out(rank) and sharded(rank)


def test_feedback_takes_the_momentum_out_while_the_exchange_is_sparse(tmp_path: Path) -> None:
    assert run_ranks(2, taken_out_of_shards_too, tmp_path) == [True, True]


def test_the_optimizer_is_handed_back(tmp_path: Path) -> None:
    assert run_ranks(2, handed_over, tmp_path) == [True, True]


def test_auto_measuring_and_choosing_dense_leaves_the_momentum(tmp_path: Path) -> None:
    assert run_ranks(2, auto_leaves_the_momentum, tmp_path) == [True, True]


def resumed_and_refused(rank: int) -> bool:
    return resumed(rank) and refused_states(rank)


def test_each_method_resumes_to_the_bit_and_names_states_that_do_not_fit(tmp_path: Path) -> None:
    assert run_ranks(2, resumed_and_refused, tmp_path) == [True, True]


def equal_to_torch(rank: int) -> bool:
    """One rank that sends everything."""
    for options in (
        {},
        {"dampening": 0.3},
        {"nesterov": True},
        {"momentum": 0.0},
        {"momentum": 0.9, "dampening": 0.9},
    ):
        for mask in (False, True):
            model, optimizer, _ = hooked(
                lambda p, options=options: sgd(p, **options),  # type: ignore[misc]
                q=0.0,
                momentum="corrected",
                mask_velocity=mask,
            )
            alone = small_model()
            train(model, optimizer, rank, *range(12))
            train(alone, sgd(alone.parameters(), **options), rank, *range(12))
            assert_same(model.module, alone, f"corrected {options} {mask}")
            own = any("momentum_buffer" in s for s in optimizer.state.values())
            assert own == (mask and options.get("momentum") != 0.0)
    kinds: list[Make] = [
        adamw,
        lambda p: adamw(p, maximize=True, lr=1e-4),
        lambda p: Adam(p, lr=0.01, weight_decay=0.1, betas=(0.5, 0.9), eps=1e-4),
        lambda p: adamw(p, lr=torch.tensor(0.01)),
        lambda p: adamw(p, fused=True),
    ]
    for kind in kinds:
        model, optimizer, state = hooked(kind, q=0.0, momentum="adam")
        alone = small_model()
        train(model, optimizer, rank, *range(12))
        train(alone, kind(alone.parameters()), rank, *range(12))
        for one, other in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert not optimizer.state_dict()["state"]
        assert set(state.state_dict()["momentum"]["steps"].values()) == {12}
    return True


def test_one_rank_that_sends_everything_equals_torch(tmp_path: Path) -> None:
    assert run_ranks(1, equal_to_torch, tmp_path) == [True]


class Corrected:
    """DGC by the book, densely: one rank's part."""

    def __init__(self, momentum: float, *, nesterov: bool, mask: bool) -> None:
        self.momentum, self.nesterov, self.mask = momentum, nesterov, mask
        self.velocity: dict[str, Tensor] = {}
        self.residual: dict[str, Tensor] = {}

    def send(self, name: str, gradient: Tensor) -> Tensor:
        velocity = self.velocity.get(name, torch.zeros_like(gradient))
        velocity = self.momentum * velocity + gradient
        added = gradient + self.momentum * velocity if self.nesterov else velocity
        whole = self.residual.get(name, torch.zeros_like(gradient)) + added
        kept = at_least_one(Q, whole.numel())
        sent = keep_top(whole.reshape(1, -1), kept).view_as(whole)
        self.residual[name] = whole - sent
        self.velocity[name] = velocity.where(sent == 0, 0.0) if self.mask else velocity
        return sent


def corrected_by_the_book(rank: int) -> bool:
    for exchange in ("allgather", "split"):
        for nesterov in (False, True):
            for mask in (True, False):
                if exchange == "split" and nesterov:
                    continue
                model, optimizer, state = hooked(
                    lambda p, nesterov=nesterov: sgd(p, nesterov=nesterov),  # type: ignore[misc]
                    momentum="corrected",
                    mask_velocity=mask,
                    exchange=exchange,
                )
                alone = small_model()
                plain = SGD(alone.parameters(), lr=0.1)
                book = Corrected(0.75, nesterov=nesterov, mask=mask)
                for step in range(1 if exchange == "split" else STEPS):
                    step_of(model, optimizer, step, rank)
                    plain.zero_grad()
                    loss_of(alone, step, rank).backward()  # type: ignore[no-untyped-call]
                    for name, parameter in alone.named_parameters():
                        assert parameter.grad is not None
                        share = book.send(name, parameter.grad) / 2
                        dist.all_reduce(share)
                        parameter.grad.copy_(share)
                    plain.step()
                velocity = state.state_dict()["momentum"]["velocity"]
                for name, held in book.velocity.items():
                    torch.testing.assert_close(velocity[name], held, rtol=1e-5, atol=1e-7)
                if exchange == "allgather":
                    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
                        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    return True


def void_steps(rank: int) -> bool:
    """An overflow on one rank leaves what every rank remembers, scaled gradients or not."""
    for method in ("corrected", "adam"):
        ends = []
        for scaled, fused in ((False, False), (True, False), (True, True)):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
            model, optimizer, state = hooked(
                lambda p, fused=fused: adamw(p, fused=fused),  # type: ignore[misc]
                momentum=method,
                grad_scaler=scaler if scaled else None,
            )
            for step in range(STEPS):
                if step == 3 and not scaled:
                    continue
                optimizer.zero_grad()
                inputs, targets = batch(step, rank)
                if step == 3 and rank == 0:
                    inputs.fill_(torch.inf)
                before = state.state_dict()
                loss = nn.functional.cross_entropy(model(inputs), targets)
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                if step == 3:
                    after = state.state_dict()
                    for key in ("velocity",) if method == "corrected" else ("first", "second"):
                        for name, held in before["momentum"][key].items():
                            assert torch.equal(held, after["momentum"][key][name])
                    assert before["momentum"].get("steps") == after["momentum"].get("steps")
                scaler.step(optimizer)
                scaler.update()
            ends.append(model)
        assert_same(ends[0], ends[1], method)
        for one, other in zip(ends[0].parameters(), ends[2].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    return True


def of_one_node(rank: int) -> bool:
    """Ranks of one node compress the sum of their gradients, and arrive at the dense mean."""
    for method, make in (("corrected", sgd), ("adam", adamw)):
        options: dict[str, Any] = {"mask_velocity": False} if method == "corrected" else {}
        model, optimizer, _ = hooked(
            make, q=0.0, momentum=method, exchange="hierarchical", ranks_per_node=2, **options
        )
        plain = DistributedDataParallel(small_model())
        train(model, optimizer, rank)
        train(plain, make(plain.parameters()), rank)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    return True


def first_backward_in_a_closure(rank: int) -> bool:
    """As Lightning does it: the first backward pass is within the first step."""
    for exchange in ("allgather", "dense"):
        model, optimizer, _ = hooked(lambda p: sgd(p, momentum=0.0), exchange=exchange)
        other, closing, _ = hooked(lambda p: sgd(p, lr=0.1 * (1 - 0.75)), exchange=exchange)

        def closure(other: nn.Module = other, closing: Optimizer = closing, step: int = 0) -> float:
            closing.zero_grad()
            loss = loss_of(other, step, rank)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.item()

        step_of(model, optimizer, 0, rank)
        closing.step(closure)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            start = dict(zip(model.parameters(), small_model().parameters(), strict=True))[one]
            moved = (two - start) if exchange == "allgather" else (two - start) / (1 - 0.75)
            torch.testing.assert_close(one - start, moved, rtol=1e-4, atol=1e-6)
    return True


def book_and_void(rank: int) -> bool:
    assert of_one_node(rank)
    assert first_backward_in_a_closure(rank)
    return corrected_by_the_book(rank) and void_steps(rank)


def test_corrected_is_dgc_and_void_steps_change_nothing(tmp_path: Path) -> None:
    assert run_ranks(2, book_and_void, tmp_path) == [True, True]


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


def saved_by_four(rank: int) -> list[dict[str, Any]]:
    saved = []
    for method in METHODS[:3]:
        model, optimizer, state = hooked(adamw if method == "adam" else sgd, momentum=method)
        train(model, optimizer, rank)
        saved.append(state.state_dict())
    return saved


def load_and_return(rank: int, states: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    taken = []
    for number, method in enumerate(METHODS[:3]):
        model, optimizer, state = hooked(adamw if method == "adam" else sgd, momentum=method)
        state.load_state_dict([saved[number] for saved in states])
        taken.append(state.state_dict())
        train(model, optimizer, rank)
    return taken


def test_another_world_size_keeps_sums_and_averages_moments(tmp_path: Path) -> None:
    states = run_ranks(4, saved_by_four, tmp_path)
    for world_size in (1, 3, 5):
        taken = run_ranks(world_size, load_and_return, tmp_path, states)
        for number in range(3):
            for key in ("residuals", "velocity"):
                before, after = (
                    [one[number] | one[number]["momentum"] for one in ranks]
                    for ranks in (states, taken)
                )
                for name in before[0].get(key, {}):
                    total = torch.stack([one[key][name].double() for one in before]).sum(0)
                    held = [one[key][name].double() for one in after if name in one[key]]
                    torch.testing.assert_close(
                        torch.stack(held).sum(0), total, rtol=1e-5, atol=1e-6
                    )
        assert taken[0][1]["momentum"]["velocity"]
        for moment in ("first", "second"):
            for name in states[0][2]["momentum"][moment]:
                mean = sum(one[2]["momentum"][moment][name].double() for one in states) / 4
                for one in taken:
                    held = one[2]["momentum"][moment][name].double()
                    torch.testing.assert_close(held, mean, rtol=1e-5, atol=1e-9)
                    assert one[2]["momentum"]["steps"][name] == STEPS
