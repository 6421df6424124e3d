"""The hook in each situation that DDP users bring, against a plain hook that does it densely.

On two ranks a sum of two shares has one order only, so parameters must be equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hook_cases import batch, keep_top
from ranks import run_ranks
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from topq_dist import TopQGradientOptimizer, register_topq_hook
from topq_dist.ddp.model_checks import trainable_names
from topq_dist.sparsity import at_least_one, k_from_q, row_shape

pytestmark = pytest.mark.gloo
Q = 0.9
STEPS = 5
# what is sent is what the plain hook sends, to the bit
PLAINLY: dict[str, Any] = {"value_format": None, "bound": None, "exchange": "allgather"}


class PlainState:
    """Error feedback by the book: dense tensors, one parameter at a time."""

    def __init__(self, choose: Callable[[Tensor], tuple[int, int, int]]) -> None:
        self.choose = choose
        self.residuals: dict[Tensor, Tensor] = {}
        self.may_be_unused = False
        self.group: dist.ProcessGroup | None = None


def plain_hook(state: PlainState, bucket: dist.GradBucket) -> Future[Tensor]:
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        compensated = gradient.float() + state.residuals.get(parameter, torch.zeros(()))
        rows, numel, kept = state.choose(parameter)
        if state.may_be_unused and not gradient.any():
            kept = 0
        sent = keep_top(compensated.reshape(rows, numel), kept).view_as(gradient)
        sent = sent.to(gradient.dtype).float()
        state.residuals[parameter] = compensated - sent
        share = sent / 2
        dist.all_reduce(share, group=state.group)
        gradient.copy_(share)
    future: Future[Tensor] = Future()
    future.set_result(bucket.buffer())
    return future


# DDP reads annotations and cannot read strings
plain_hook.__annotations__ = {"bucket": dist.GradBucket, "return": Future[Tensor]}


def whole(parameter: Tensor) -> tuple[int, int, int]:
    return 1, parameter.numel(), at_least_one(Q, parameter.numel())


class Net(nn.Module):
    """Two layers in use, one frozen, one used in odd steps only or never."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.into = nn.Linear(13, 40)
        self.frozen = nn.Linear(40, 40).requires_grad_(False)
        self.sometimes = nn.Linear(40, 40)
        self.out = nn.Linear(40, 5)

    def forward(self, inputs: Tensor, odd: bool = True) -> Tensor:
        hidden = self.frozen(torch.tanh(self.into(inputs)))
        if odd:
            hidden = torch.tanh(self.sometimes(hidden))
        return self.out(hidden)  # type: ignore[no-any-return]


Train = Callable[[DistributedDataParallel, torch.optim.Optimizer, int], None]


def backward(model: nn.Module, step: int, rank: int, odd: bool = True) -> None:
    inputs, targets = batch(step, rank)
    dtype = next(model.parameters()).dtype
    loss = cross_entropy(model(inputs.to(dtype), odd), targets)
    loss.backward()  # type: ignore[no-untyped-call]


def plainly(model: DistributedDataParallel, optimizer: torch.optim.Optimizer, rank: int) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step, rank)
        optimizer.step()


def accumulating(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer, rank: int
) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        with model.no_sync():
            backward(model, 2 * step, rank)
        backward(model, 2 * step + 1, rank)
        optimizer.step()


def unevenly(model: DistributedDataParallel, optimizer: torch.optim.Optimizer, rank: int) -> None:
    with model.join():
        for step in range(STEPS + 3 * rank):
            optimizer.zero_grad()
            backward(model, step, rank)
            optimizer.step()


def with_unused(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer, rank: int
) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        # in some steps one rank alone uses the layer, in some both do
        backward(model, step, rank, odd=step % 2 == 1 or (rank == 0 and step == 2))
        optimizer.step()


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_equal(model: nn.Module, other: nn.Module, situation: str) -> None:
    moved = 0
    for (name, one), two, untouched in zip(
        model.named_parameters(), other.parameters(), Net().parameters(), strict=True
    ):
        assert torch.equal(one, two), (situation, name)
        moved += not torch.equal(one.float(), untouched)
    assert moved >= 4, situation


def check(
    situation: str,
    train: Train,
    rank: int,
    *,
    net: Callable[[], nn.Module] = Net,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> None:
    # small buckets, so that there are several
    options = {"process_group": group, "bucket_cap_mb": 0.005} | options
    hooked = DistributedDataParallel(net(), **options)
    state = register_topq_hook(hooked, q=Q, **PLAINLY)
    train(hooked, torch.optim.SGD(hooked.parameters(), lr=0.2, momentum=0.9), rank)
    plain = DistributedDataParallel(net(), **options)
    plain_state = PlainState(whole)
    plain_state.group = group
    plain_state.may_be_unused = options.get("find_unused_parameters", False)
    plain.register_comm_hook(plain_state, plain_hook)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.2, momentum=0.9), rank)
    assert_equal(hooked.module, plain.module, situation)
    residuals = state.state_dict()["residuals"]
    for parameter, name in trainable_names(hooked).items():
        (other,) = [p for p, plain_name in trainable_names(plain).items() if plain_name == name]
        assert parameter.shape == other.shape
        assert torch.equal(residuals[name], plain_state.residuals[other]), (situation, name)


def compiled_net() -> nn.Module:
    net: Any = torch.compile(Net(), backend="aot_eager")
    return net  # type: ignore[no-any-return]


def usual_situations(rank: int) -> bool:
    check("plain", plainly, rank)
    check("no_sync", accumulating, rank)
    check("join", unevenly, rank)
    check("find_unused_parameters", with_unused, rank, find_unused_parameters=True)
    check("static_graph", plainly, rank, static_graph=True)
    check("gradient_as_bucket_view", plainly, rank, gradient_as_bucket_view=True)
    check("view and no_sync", accumulating, rank, gradient_as_bucket_view=True)
    for dtype in (torch.bfloat16, torch.float16):
        check(str(dtype), plainly, rank, net=lambda dtype=dtype: Net().to(dtype))  # type: ignore[misc]
    # the compiler's own bucketing takes no buckets as small as these
    check("torch.compile", plainly, rank, net=compiled_net, bucket_cap_mb=25)
    return True


def test_the_usual_situations(tmp_path: Path) -> None:
    assert run_ranks(2, usual_situations, tmp_path) == [True, True]


def several_groups(rank: int) -> None:
    """Paired with an optimizer of two groups that differ in q and param_ndim."""

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        trainable = [p for p in module.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trainable if p.ndim > 1], "q": 0.8, "param_ndim": -1},
            {"params": [p for p in trainable if p.ndim == 1], "q": 0.5, "param_ndim": None},
        ]

    hooked = DistributedDataParallel(Net(), bucket_cap_mb=0.005)
    optimizer = TopQGradientOptimizer(groups(hooked.module), lr=0.2)
    register_topq_hook(hooked, optimizer, **PLAINLY)
    plain = DistributedDataParallel(Net(), bucket_cap_mb=0.005)
    settings: dict[Tensor, dict[str, Any]] = {}
    for group in groups(plain.module):
        settings.update(dict.fromkeys(group["params"], group))

    def choose(parameter: Tensor) -> tuple[int, int, int]:
        rows, numel = row_shape(parameter.shape, settings[parameter]["param_ndim"])
        return rows, numel, k_from_q(settings[parameter]["q"], numel)

    plain.register_comm_hook(PlainState(choose), plain_hook)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.2)
    for step in range(STEPS):
        if step == 3:
            # a schedule changes q between steps
            optimizer.param_groups[0]["q"] = 0.95
            for p in plain.module.parameters():
                if p in settings and p.ndim > 1:
                    settings[p] = {"q": 0.95, "param_ndim": -1}
        for model, inner in ((hooked, optimizer), (plain, sgd)):
            inner.zero_grad()
            backward(model, step, rank)
            inner.step()
    assert_equal(hooked.module, plain.module, "several groups")


def amp(rank: int) -> None:
    """fp16-style loss scaling: an overflow on one rank is skipped by both, and costs nothing."""
    results = []
    for scaled in (False, True):
        model = DistributedDataParallel(Net(), bucket_cap_mb=0.005)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scaled)
        state = register_topq_hook(
            model,
            q=Q,
            **PLAINLY,
            grad_scaler=scaler if scaled else None,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for step in range(2 * STEPS):
            if step == 4 and not scaled:
                continue
            optimizer.zero_grad()
            inputs, targets = batch(step, rank)
            if step == 4 and rank == 0:
                inputs = inputs.fill_(torch.inf)
            before = state.state_dict()["residuals"]
            scaler.scale(cross_entropy(model(inputs), targets)).backward()  # type: ignore[no-untyped-call]
            if step == 4:
                assert not any(
                    bool(p.grad.isfinite().any()) for p in model.parameters() if p.grad is not None
                )
                after = state.state_dict()["residuals"]
                assert all(torch.equal(before[name], after[name]) for name in before)
            scaler.step(optimizer)
            scaler.update()
        results.append((model.module, state.state_dict()["residuals"]))
    # powers of two scale exactly
    assert_equal(results[0][0], results[1][0], "GradScaler")
    for name, residual in results[0][1].items():
        assert torch.equal(residual, results[1][1][name])


def clipped(rank: int) -> None:
    limit = 0.05
    hooked = DistributedDataParallel(Net(), bucket_cap_mb=0.005)
    register_topq_hook(hooked, q=Q, clip_norm=limit, **PLAINLY)
    alone = Net()
    residuals: dict[str, Tensor] = {}
    for step in range(STEPS):
        for model in (hooked, alone):
            model.zero_grad()
            backward(model, step, rank)
        trainable = [p for p in alone.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trainable, limit)
        assert norm > limit
        for (name, one), two in zip(
            hooked.module.named_parameters(), alone.parameters(), strict=True
        ):
            if two.grad is None:
                continue
            compensated = two.grad + residuals.get(name, torch.zeros(()))
            sent = keep_top(compensated.reshape(1, -1), whole(two)[2]).view_as(two)
            residuals[name] = compensated - sent
            dist.all_reduce(sent)
            torch.testing.assert_close(one.grad, sent / 2, rtol=1e-4, atol=1e-7)


def bucket_scope(rank: int) -> None:
    """One bucket: the top-Q part of all parameters together."""
    hooked = DistributedDataParallel(Net())
    state = register_topq_hook(hooked, q=Q, scope="bucket", **PLAINLY)
    alone = Net()
    residual = None
    for step in range(STEPS):
        for model in (hooked, alone):
            model.zero_grad()
            backward(model, step, rank)
        flat = torch.cat([p.grad.view(-1) for p in alone.parameters() if p.grad is not None])
        compensated = flat if residual is None else flat + residual
        sent = keep_top(compensated.view(1, -1), k_from_q(Q, flat.numel())).view(-1)
        residual = compensated - sent
        dist.all_reduce(sent)
        average = torch.cat(
            [p.grad.view(-1) for p in hooked.module.parameters() if p.grad is not None]
        )
        assert torch.equal(average, sent / 2)
        for model in (hooked, alone):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.1 * parameter.sign())
    state.q = 1.0
    hooked.zero_grad()
    backward(hooked, 0, rank)
    assert all(not p.grad.any() for p in hooked.parameters() if p.grad is not None)


def other_situations(rank: int) -> bool:
    several_groups(rank)
    amp(rank)
    clipped(rank)
    bucket_scope(rank)
    return True


def test_groups_amp_clipping_and_bucket_scope(tmp_path: Path) -> None:
    assert run_ranks(2, other_situations, tmp_path) == [True, True]


def subgroups_and_residuals(rank: int) -> list[dict[str, Any]]:
    """Two models, each trained by a half of the ranks; then the states of one of them all."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    check("subgroup", plainly, rank, group=halves[rank // 2])
    model = DistributedDataParallel(Net())
    state = register_topq_hook(model, q=Q, **PLAINLY)
    backward(model, 0, rank)
    return [state.state_dict()]


def resumed_by(rank: int, folder: Path, states: list[dict[str, Any]]) -> dict[str, Tensor]:
    model = DistributedDataParallel(Net())
    state = register_topq_hook(model, q=Q, **PLAINLY)
    mine = states[0] | {"rank": rank, "world_size": dist.get_world_size()}
    name = next(iter(mine["residuals"]))
    for bad in (
        mine | {"rank": 5},
        mine | {"version": 9},
        mine | {"world_size": 9},
        mine | {"ranks_per_node": 2},
        mine | {"stats": {}},
        mine | {"density": {}},
        mine | {"residuals": {name: torch.zeros(1)}},
        mine | {"residuals": {name: "much"}},
        mine | {"residuals": {name: torch.full_like(mine["residuals"][name], torch.nan)}},
        mine | {"density": {"q": 2.0}},
        mine | {"stats": dict.fromkeys(mine["stats"])},
        mine | {"residuals": {"nowhere": torch.zeros(1)}},
        {key: value for key, value in mine.items() if key != "residuals"},
        states[1:],
        [],
    ):
        with pytest.raises((TypeError, ValueError), match="expected"):
            state.load_state_dict(bad)
        assert state.state_dict()["residuals"] == {}
    state.load_state_dict(states)
    residuals: dict[str, Tensor] = state.state_dict()["residuals"]
    return residuals


def test_subgroups_and_residuals_across_world_sizes(tmp_path: Path) -> None:
    states = [result[0] for result in run_ranks(4, subgroups_and_residuals, tmp_path)]
    for world_size in (1, 3):
        loaded = run_ranks(world_size, resumed_by, tmp_path, tmp_path, states)
        for name in states[0]["residuals"]:
            before = sum(state["residuals"][name].double() for state in states)
            after = sum(residuals[name].double() for residuals in loaded if name in residuals)
            torch.testing.assert_close(after, before)
