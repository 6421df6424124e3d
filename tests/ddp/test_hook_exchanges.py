"""Every exchange against what it must arrive at, on four ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hook_cases import EXCHANGES, Reference, keep_top, loss_of, small_model, whole
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import TopQState, register_topq_hook
from topq_dist.exchange.registry import ExchangeName

pytestmark = pytest.mark.gloo
STEPS = 6
SPARSE = [exchange for exchange in EXCHANGES if exchange != "dense"]


def hooked(
    exchange: ExchangeName, **options: Any
) -> tuple[DistributedDataParallel, TopQState, torch.optim.Optimizer]:
    model = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
    if exchange == "hierarchical":
        options["ranks_per_node"] = 2
    options = {"value_format": None} | options
    state = register_topq_hook(model, q=0.9, exchange=exchange, **options)
    return model, state, torch.optim.SGD(model.parameters(), lr=0.2)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def backward(model: nn.Module, step: int, rank: int) -> None:
    model.zero_grad()
    loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]


def without_feedback(rank: int) -> dict[str, dict[str, Tensor]]:
    results: dict[str, dict[str, Tensor]] = {}
    for exchange in SPARSE:
        model, _, optimizer = hooked(exchange, error_feedback=False)
        for step in range(STEPS):
            backward(model, step, rank)
            optimizer.step()
        results[exchange] = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    return results


class NodeReference(Reference):
    """Two nodes of two ranks: the node's mean is masked, not each rank's gradient."""

    def backward(self, step: int) -> None:
        totals: dict[str, Tensor] = {}
        for node in range(2):
            self.model.zero_grad()
            for rank in (2 * node, 2 * node + 1):
                loss_of(self.model, step, rank).backward()  # type: ignore[no-untyped-call]
            for name, parameter in self.model.named_parameters():
                assert parameter.grad is not None
                _, numel, kept = self.choose(name, parameter)
                mean = (parameter.grad / 2).reshape(1, numel)
                share = keep_top(mean, kept).view_as(parameter) / 2
                totals[name] = totals[name] + share if node else share
        for name, parameter in self.model.named_parameters():
            parameter.grad = totals[name]


def test_without_feedback_each_exchange_is_exact(tmp_path: Path) -> None:
    ranks = run_ranks(4, without_feedback, tmp_path)
    for exchange in SPARSE:
        kind = NodeReference if exchange == "hierarchical" else Reference
        reference = kind(small_model(), 4, whole(0.9), error_feedback=False)
        optimizer = torch.optim.SGD(reference.model.parameters(), lr=0.2)
        for step in range(STEPS):
            reference.backward(step)
            optimizer.step()
        for rank in ranks:
            for name, parameter in reference.model.named_parameters():
                assert torch.equal(rank[exchange][name], parameter), (exchange, name)


def conserving(rank: int) -> dict[str, list[dict[str, Any]]]:
    """The outcome of each step and what it left, one rank overflowing in the last but one."""
    results: dict[str, list[dict[str, Any]]] = {}
    for exchange in EXCHANGES:
        model, state, optimizer = hooked(exchange, value_format="fp16")
        steps = []
        for step in range(STEPS):
            with model.no_sync():
                backward(model, step, rank)
            own = gradients(model.module)
            before = state.state_dict()["residuals"]
            overflow = step == STEPS - 2 and rank == 1
            handle = model.module[2].weight.register_hook(
                lambda g, overflow=overflow: g.clone().fill_(torch.inf) if overflow else g
            )
            backward(model, step, rank)
            handle.remove()
            average = gradients(model.module)
            after = state.state_dict()["residuals"]
            if step == STEPS - 2:
                assert before.keys() == after.keys()
                assert all(torch.equal(before[name], after[name]) for name in before), exchange
                finite = [bool(g.isfinite().all()) for g in average.values()]
                # dense has nothing to protect, and marks what overflowed as DDP does
                assert not any(finite) or (exchange == "dense" and not all(finite))
                continue
            steps.append({"own": own, "before": before, "average": average, "after": after})
            optimizer.step()
        results[exchange] = steps
    return results


def test_with_feedback_nothing_is_lost_and_an_overflow_voids_the_step(tmp_path: Path) -> None:
    ranks = run_ranks(4, conserving, tmp_path)
    for exchange in EXCHANGES:
        for step in range(STEPS - 1):
            parts = [rank[exchange][step] for rank in ranks]
            for name, average in parts[0]["average"].items():
                assert all(torch.equal(part["average"][name], average) for part in parts)
                brought = torch.zeros_like(average, dtype=torch.float64)
                left = 4 * average.double()
                for part in parts:
                    brought += part["own"][name].double()
                    brought += part["before"].get(name, torch.zeros(()))
                    left += part["after"].get(name, torch.zeros(()))
                torch.testing.assert_close(left, brought, rtol=1e-4, atol=1e-6, msg=exchange)


def near_the_largest(rank: int) -> bool:
    """A step whose sum no residual could hold, and one after it."""
    model, state, _ = hooked("split", value_format="fp32")
    backward(model, 0, rank)
    before = state.state_dict()["residuals"]
    handle = model.module[2].weight.register_hook(lambda g: torch.full_like(g, 3e38))
    backward(model, 1, rank)
    handle.remove()
    assert not any(bool(g.isfinite().any()) for g in gradients(model.module).values())
    after = state.state_dict()["residuals"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    backward(model, 2, rank)
    return all(bool(g.isfinite().all()) for g in gradients(model.module).values())


def test_a_sum_past_what_a_residual_can_hold_voids_the_step_on_every_rank(tmp_path: Path) -> None:
    assert all(run_ranks(2, near_the_largest, tmp_path))


def large_averages(rank: int) -> list[float]:
    """Return the largest elements of float16 averages of which node sums are larger than it has."""
    model = DistributedDataParallel(nn.Linear(8, 8, bias=False).half())
    register_topq_hook(
        model,
        q=0.5,
        exchange="hierarchical",
        ranks_per_node=2,
        momentum="optimizer",
        value_format="fp32",
        bound=None,
    )
    (weight,) = model.parameters()
    largest = []
    for _ in range(2):
        model.zero_grad()
        # twice that in a node's sum, and four times with what has waited for a step
        (model(torch.eye(8).half()).float() * 20_000.0).sum().backward()
        assert weight.grad is not None
        largest.append(float(weight.grad.max()))
    return largest


def test_an_average_that_float16_holds_is_no_infinity_where_a_nodes_sum_is(tmp_path: Path) -> None:
    assert run_ranks(4, large_averages, tmp_path) == [[20_000.0, 40_000.0]] * 4


def dense_is_ddp(rank: int) -> bool:
    plain = DistributedDataParallel(small_model())
    model, state, _ = hooked("dense")
    for step in range(3):
        backward(plain, step, rank)
        backward(model, step, rank)
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    # and 64 bytes a step, which tell of settings and failures
    assert 0.99 < state.stats().ratio < 1.0
    return True


def split_bytes(rank: int) -> float:
    """Bytes on the link over those of an all-gather's frames, once lengths are known."""
    wire_bytes = {}
    exchanges: tuple[ExchangeName, ...] = ("allgather", "split")
    for exchange in exchanges:
        model = DistributedDataParallel(nn.Linear(500, 400))
        state = register_topq_hook(model, q=0.9, value_format=None, exchange=exchange)
        for step in range(8):
            before = state.stats().wire_bytes
            inputs = torch.randn(4, 500, generator=torch.Generator().manual_seed(10 * step + rank))
            model(inputs).square().sum().backward()
            wire_bytes[exchange] = state.stats().wire_bytes - before
    return 3 * wire_bytes["split"] / wire_bytes["allgather"]


def test_split_sends_less_than_two_frames(tmp_path: Path) -> None:
    # 2 (W - 1) / W frames, and less where an owner's own part holds much of its residual
    assert all(frames < 1.7 for frames in run_ranks(4, split_bytes, tmp_path))


def auto_agrees(rank: int) -> str:
    model, state, optimizer = hooked("auto")
    assert state.chosen_exchange is None
    for step in range(60):
        backward(model, step, rank)
        optimizer.step()
    chosen = state.chosen_exchange
    assert chosen is not None
    _, resumed, _ = hooked("auto")
    resumed.load_state_dict(state.state_dict())
    assert resumed.chosen_exchange == chosen
    _, exact, _ = hooked("auto", error_feedback=False)
    assert exact.chosen_exchange == "allgather"
    return chosen


def dense_and_auto(rank: int) -> str:
    assert dense_is_ddp(rank)
    return auto_agrees(rank)


def test_dense_is_plain_ddp_and_auto_chooses_alike_on_every_rank(tmp_path: Path) -> None:
    chosen = run_ranks(4, dense_and_auto, tmp_path)
    assert len(set(chosen)) == 1
    assert chosen[0] in {"allgather", "split", "dense"}
