"""Momentum kept on the rank: corrected as in DGC's book, adam as torch's, kept in void steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ddp.momentum_hooks import (
    STEPS,
    Make,
    Q,
    adamw,
    assert_same,
    hooked,
    sgd,
    step_of,
    train,
)
from hook_cases import batch, keep_top, loss_of, small_model
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer

from topq_dist.sparsity import at_least_one

pytestmark = pytest.mark.gloo


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
