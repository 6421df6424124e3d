"""The hook's parameters against references, bit for bit, in real gloo processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hook_cases import Reference, by_rows, loss_of, small_model, whole
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import TopQGradientOptimizer, register_topq_hook

pytestmark = pytest.mark.gloo
STEPS = 20
# what is sent is what the references send, to the bit
EXACT: dict[str, Any] = {"value_format": None, "bound": None, "exchange": "allgather"}


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups that differ in all that the hook reads; biases as a whole so that they move."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    return [
        {"params": weights, "q": 0.8, "dq": 0.1, "param_ndim": -1},
        {"params": biases, "q": 0.4, "param_ndim": None, "grad_scale": 0.5},
    ]


def top_q(model: nn.Module) -> TopQGradientOptimizer:
    generator = torch.Generator().manual_seed(7)
    return TopQGradientOptimizer(
        groups(model), torch.optim.SGD, q=0.5, lr=0.2, momentum=0.9, generator=generator
    )


def paired_on_one_rank(rank: int) -> bool:
    alone = small_model()
    train(alone, top_q(alone), rank)
    model = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
    optimizer = top_q(model.module)
    register_topq_hook(model, optimizer, error_feedback=False, **EXACT)
    train(model, optimizer, rank)
    assert_same(parameters_of(model.module), parameters_of(alone))
    assert not torch.equal(next(model.module.parameters()), next(small_model().parameters()))
    return True


def test_one_paired_rank_without_feedback_equals_the_optimizer_alone(tmp_path: Path) -> None:
    assert run_ranks(1, paired_on_one_rank, tmp_path) == [True]


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def trained_by_ranks(rank: int, error_feedback: bool) -> dict[str, dict[str, Tensor]]:
    """Paired, then unpaired, over several buckets that DDP rebuilds after the first step."""
    trained = {}
    model = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
    optimizer = TopQGradientOptimizer(
        model.parameters(), q=0.8, param_ndim=None, lr=0.2, momentum=0.9
    )
    # the reference has its momentum behind error feedback, which is warned of
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        register_topq_hook(
            model,
            optimizer,
            momentum="optimizer",
            error_feedback=error_feedback,
            **EXACT,
        )
    train(model, optimizer, rank)
    trained["paired"] = parameters_of(model.module)
    model = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
    state = register_topq_hook(model, q=0.9, error_feedback=error_feedback, **EXACT)
    train(model, sgd(model), rank)
    trained["unpaired"] = parameters_of(model.module)
    trained["residuals"] = state.state_dict()["residuals"]
    assert state.stats().steps == STEPS
    assert state.stats().dense_bytes == STEPS * 4 * sum(p.numel() for p in model.parameters())
    return trained


@pytest.mark.parametrize("error_feedback", [False, True])
def test_four_ranks_equal_a_single_process_reference(tmp_path: Path, error_feedback: bool) -> None:
    ranks = run_ranks(4, trained_by_ranks, tmp_path, error_feedback)
    for kind, choose in (("paired", by_rows(0.8, None)), ("unpaired", whole(0.9))):
        reference = Reference(small_model(), 4, choose, error_feedback=error_feedback)
        optimizer = sgd(reference.model)
        for step in range(STEPS):
            reference.backward(step)
            optimizer.step()
        for rank in ranks:
            assert_same(rank[kind], parameters_of(reference.model))
    for rank, result in enumerate(ranks):
        if error_feedback:
            assert_same(result["residuals"], reference.residuals[rank])
        else:
            assert result["residuals"] == {}


def feedback_keeps_everything(rank: int) -> bool:
    model = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
    state = register_topq_hook(model, q=0.95, **EXACT)
    optimizer = sgd(model)
    for step in range(STEPS):
        before = state.state_dict()["residuals"]
        optimizer.zero_grad()
        with model.no_sync():
            loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]
        gradients = {
            name: p.grad.clone()
            for name, p in model.module.named_parameters()
            if p.grad is not None
        }
        optimizer.zero_grad()
        loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]
        after = state.state_dict()["residuals"]
        for name, parameter in model.module.named_parameters():
            sent = parameter.grad
            assert sent is not None
            assert 0 < int(sent.count_nonzero()) <= max(1, round(0.05 * sent.numel()) + 1)
            compensated = gradients[name] + before.get(name, torch.zeros_like(sent))
            assert torch.equal(sent + after[name], compensated), (step, name)
        optimizer.step()
    return True


def test_sent_plus_residual_is_gradient_plus_previous_residual(tmp_path: Path) -> None:
    assert run_ranks(1, feedback_keeps_everything, tmp_path) == [True]
