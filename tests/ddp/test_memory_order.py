"""Parameters whose elements do not lie row after row: their rows and residuals are logical ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import TopQGradientOptimizer, TopQState, register_topq_hook
from topq_dist.compress.layout import Layout, memory_order
from topq_dist.compress.residual import Residuals
from topq_dist.sparsity import rows_lie_apart

EXACT: dict[str, Any] = {"exchange": "allgather", "value_format": None, "bound": None}


class Mixed(nn.Module):
    """Convolutions, a transposed matrix, and one that lies row after row."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one = nn.Conv2d(3, 8, 3, bias=False)
        self.two = nn.Conv2d(8, 4, 3)
        self.matrix = nn.Parameter(torch.randn(6, 4))
        self.out = nn.Linear(6, 5)
        if kind == "channels_last":
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if kind == "transposed":
            self.matrix = nn.Parameter(self.matrix.detach().t().contiguous().t())
            self.one.weight = nn.Parameter(
                self.one.weight.detach().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
            )

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.two(torch.tanh(self.one(images))).mean((2, 3))
        out: Tensor = self.out(hidden @ self.matrix.t())
        return out


KINDS = ("plain", "channels_last", "transposed")


def loss_of(model: nn.Module, step: int, rank: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    loss: Tensor = model(torch.randn(2, 3, 10, 10, generator=generator)).square().sum()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def paired(module: nn.Module, param_ndim: int | None) -> TopQGradientOptimizer:
    groups: list[dict[str, Any]] = [
        {"params": [one for one in module.parameters() if one.ndim > 2], "param_ndim": param_ndim},
        {"params": [one for one in module.parameters() if one.ndim <= 2], "param_ndim": -1},
    ]
    return TopQGradientOptimizer(groups, torch.optim.SGD, q=0.4, lr=0.01)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", KINDS)
def test_its_rows_are_those_of_the_optimizer_alone(kind: str) -> None:
    for param_ndim in (None, 0, 1, 2, 3, -1):
        alone = Mixed(kind)
        train(alone, paired(alone, param_ndim), range(3))
        hooked = DistributedDataParallel(Mixed(kind), bucket_cap_mb=0.001)
        optimizer = paired(hooked.module, param_ndim)
        register_topq_hook(hooked, optimizer, error_feedback=False, **EXACT)
        train(hooked, optimizer, range(3))
        for (name, one), two in zip(
            alone.named_parameters(), hooked.module.parameters(), strict=True
        ):
            assert torch.equal(one, two), (param_ndim, name)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("as_view", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_rows_keeps_what_is_owed(kind: str, as_view: bool) -> None:
    model = DistributedDataParallel(
        Mixed(kind), bucket_cap_mb=0.001, gradient_as_bucket_view=as_view
    )
    optimizer = paired(model.module, 1)
    state = register_topq_hook(model, optimizer, momentum="optimizer", **EXACT)
    for step, param_ndim in enumerate((1, 1, None, 2, 1)):
        optimizer.param_groups[0]["param_ndim"] = param_ndim
        before = state.state_dict()["residuals"]
        with model.no_sync():
            optimizer.zero_grad()
            loss_of(model, step).backward()  # type: ignore[no-untyped-call]
        own = {n: p.grad.clone() for n, p in model.module.named_parameters() if p.grad is not None}
        optimizer.zero_grad()
        loss_of(model, step).backward()  # type: ignore[no-untyped-call]
        after = state.state_dict()["residuals"]
        for name, parameter in model.module.named_parameters():
            assert parameter.grad is not None
            owed = own[name] + before.get(name, torch.zeros(()))
            assert torch.equal(parameter.grad + after[name], owed), (step, name)
            # each element of it is sent or kept
            assert bool(((parameter.grad == 0) | (after[name] == 0)).all()), (step, name)


def hooked(kind: str, **options: Any) -> tuple[DistributedDataParallel, Any, TopQState]:
    model = DistributedDataParallel(Mixed(kind), bucket_cap_mb=0.001)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    return model, optimizer, register_topq_hook(model, optimizer, q=0.8, **EXACT, **options)


def as_saved_before(state: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """Return a state as older versions have written it: in memory's order, shaped as if in rows."""
    orders = {name: memory_order(one) for name, one in module.named_parameters()}

    def older(held: dict[str, Any]) -> dict[str, Any]:
        for name, one in held.items():
            order = orders[name]
            if isinstance(one, Tensor) and order is not None:
                memory = torch.empty(one.numel(), dtype=one.dtype)
                memory.as_strided(one.shape, order).copy_(one)
                held[name] = memory.view(one.shape)
        return held

    del state["order"]
    older(state["residuals"])
    for value in state["momentum"].values():
        if isinstance(value, dict):
            older(value)
    return state


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("method", ["feedback", "corrected", "adam"])
def test_what_is_saved_is_in_rows_and_older_states_are_read(method: Any) -> None:
    saved: dict[str, Any] = {}
    ends: dict[str, Any] = {}
    for kind in ("plain", "channels_last"):
        model, optimizer, state = hooked(kind, momentum=method)
        train(model, optimizer, range(3))
        saved[kind] = state.state_dict()
        assert all(one.is_contiguous() for one in saved[kind]["residuals"].values())
        weights = {name: one.clone() for name, one in model.module.state_dict().items()}
        inner = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, range(3, 6))
        ends[kind] = [one.detach().clone() for one in model.parameters()]
        older = as_saved_before(copy.deepcopy(saved[kind]), model.module)
        for resumed_from in (saved[kind], older):
            again, other, resumed = hooked(kind, momentum=method)
            again.module.load_state_dict(weights)
            other.load_state_dict(copy.deepcopy(inner))
            resumed.load_state_dict(resumed_from)
            train(again, other, range(3, 6))
            for one, two in zip(again.parameters(), ends[kind], strict=True):
                assert torch.equal(one, two)


@pytest.mark.usefixtures("alone")
def test_a_residual_is_the_same_whatever_the_order() -> None:
    saved = []
    for kind in KINDS:
        model, optimizer, state = hooked(kind)
        train(model, optimizer, range(1))
        saved.append(state.state_dict()["residuals"])
    for other in saved[1:]:
        for name, one in other.items():
            # convolutions differ in their last bits
            torch.testing.assert_close(one, saved[0][name], rtol=1e-3, atol=1e-3)


def disagreeing_rows(rank: int) -> str:
    model = DistributedDataParallel(Mixed("channels_last"))
    optimizer = paired(model.module, 1)
    register_topq_hook(model, optimizer, **EXACT)
    train(model, optimizer, range(2), rank)
    optimizer.param_groups[0]["param_ndim"] = 1 if rank else None
    try:
        train(model, optimizer, range(2, 3), rank)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.gloo
def test_ranks_that_cut_other_rows_say_so(tmp_path: Path) -> None:
    for said in run_ranks(2, disagreeing_rows, tmp_path):
        assert "param_ndim=None" in said
        assert "param_ndim=1" in said


def test_which_rows_lie_apart() -> None:
    last = torch.empty(4, 3, 5, 2).to(memory_format=torch.channels_last)
    strides = memory_order(last)
    assert strides == last.stride()
    apart = {ndim: rows_lie_apart(last.shape, strides, ndim) for ndim in (None, 0, 1, 2, 3, 4)}
    assert apart == {None: False, 0: False, 1: True, 2: True, 3: False, 4: False}
    assert rows_lie_apart((6, 4), (1, 6), 1)
    assert not rows_lie_apart((6, 1), (1, 6), 1)
    assert not rows_lie_apart((1, 6), (1, 1), 1)
    assert not rows_lie_apart((0, 6), (1, 1), 1)


def test_which_tensors_have_an_order_of_their_own() -> None:
    plain: Callable[..., Tensor] = torch.empty
    assert memory_order(plain(4, 3)) is None
    assert memory_order(plain(4, 3).t()) == (1, 3)
    assert memory_order(plain(4, 6)[:, ::2]) is None
    assert memory_order(plain(4, 1).expand(4, 3)) is None
    assert memory_order(plain(0, 3).t()) is None
    assert memory_order(plain(2, 1, 1, 1).to(memory_format=torch.channels_last)) is None


def test_residuals_move_between_orders() -> None:
    residuals = Residuals()
    kind: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    plain = Layout(names=("w",), shapes=((2, 3),))
    turned = Layout(names=("w",), shapes=((2, 3),), strides=((1, 2),))
    residuals.flat(plain, **kind).copy_(torch.arange(6.0))
    assert residuals.flat(turned, **kind).tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    assert residuals.state_dict()["w"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert residuals.home(plain) is residuals.home(turned)
    assert residuals.flat(plain, **kind).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
