"""Advice on real steps: among mirrors, among gloo ranks, and where it cannot be given."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from topq_dist import ExchangeError, advise, register_topq_hook
from topq_dist.advice.engine import Training, step_with
from topq_dist.advice.time_model import Method

WIDTH = 160
FEW: dict[str, Any] = {"qs": (0.9,), "value_formats": ("int2",), "budget_s": 0.1}


def build(rank: int = 0) -> tuple[nn.Module, Callable[[nn.Module], Tensor], torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
    batches = torch.Generator().manual_seed(rank + 1)

    def loss(wrapped: nn.Module) -> Tensor:
        inputs, targets = torch.randn(2, 8, WIDTH, generator=batches)
        return nn.functional.mse_loss(wrapped(inputs), targets)

    return model, loss, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def advised_rank(rank: int) -> dict[str, Any]:
    model, loss, optimizer = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    advice = advise(model, loss, optimizer, **FEW)
    model_is_as_before = all(
        torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()
    )
    return {
        "json": advice.as_json(),
        "as before": model_is_as_before and not optimizer.state_dict()["state"],
    }


def test_ranks_measure_their_link_and_say_the_same(tmp_path: Path) -> None:
    first, *others = run_ranks(3, advised_rank, tmp_path)
    assert others == [first, first]
    assert first["as before"]
    told = json.loads(first["json"])
    assert told["world_size"] == 3
    assert {"all_reduce float32", "all_gather uint8", "all_to_all uint8"} <= set(
        told["link"]["points"]
    )
    assert {one["method"]["kind"] for one in told["predictions"]} == {
        *("dense", "fp16", "PowerSGD", "top-Q", "local steps")
    }
    steps_s = [one["step_s"] for one in told["predictions"]]
    assert steps_s == sorted(steps_s)
    assert all(one["link_s"] > 0 for one in told["predictions"])
    dense = next(one for one in told["predictions"] if one["method"]["kind"] == "dense")
    # gradients, and what DistributedDataParallel sends of the buffers
    assert dense["wire_bytes"] == pytest.approx(16 / 3 * told["parameters"] + 4 * 2 * WIDTH + 8)
    assert told["recommended"] in {one["title"] for one in told["predictions"]}


def failing_rank(rank: int) -> str:
    model, loss, optimizer = build()

    def fails(wrapped: nn.Module) -> Tensor:
        if rank == 1:
            raise ValueError("no batch here")
        return loss(wrapped)

    with pytest.raises((ExchangeError, ValueError), match="no batch here") as raised:
        advise(model, fails, optimizer, **FEW)
    return type(raised.value).__name__


def test_a_rank_whose_first_step_fails_is_not_waited_for(tmp_path: Path) -> None:
    assert run_ranks(2, failing_rank, tmp_path) == ["ExchangeError", "ValueError"]


def wire_bytes_rank(rank: int, exchange: Any) -> float:
    model, loss, optimizer = build(rank)
    wrapped = DistributedDataParallel(model)
    state = register_topq_hook(wrapped, optimizer, q=0.9, exchange=exchange)
    handed = []
    for _ in range(8):
        before = state.stats().wire_bytes
        optimizer.zero_grad()
        torch.autograd.backward(loss(wrapped))
        optimizer.step()
        handed.append(state.stats().wire_bytes - before)
    return float(handed[-1])


@pytest.mark.parametrize("exchange", ["allgather", "split"])
def test_mirrors_hand_over_what_real_ranks_do(exchange: Any, tmp_path: Path) -> None:
    real = run_ranks(3, wire_bytes_rank, tmp_path, exchange)[0]
    method = Method(kind="top-Q", q=0.9, value_format="int2", exchange=exchange)
    model, loss, optimizer = build()
    training = Training(model=model, loss=loss, optimizer=optimizer)
    measured = step_with(training, method, world_size=3, steps=4)
    frames = [one for one in measured.traffic if one.collective.startswith("all_")]
    assert sum(one.wire_bytes(3) for one in frames) == pytest.approx(real, rel=0.1)
    # of seconds no more is certain: other work may slow any of these few steps
    assert len(measured.bare_s) == 4
    assert min(measured.bare_s) > 0


def test_a_given_link_needs_no_group_and_leaves_none() -> None:
    model, loss, optimizer = build()
    link: dict[str, Any] = {"bandwidth_bits_per_s": 1e6, "latency_s": 1e-3, "world_size": 4}
    advice = advise(model, loss, optimizer, **link, **FEW)
    assert not dist.is_initialized()
    dense = next(one for one in advice.predictions if one.method.kind == "dense")
    buffers_s = 8e-6 * (4 * 2 * WIDTH + 8)
    handed = 4 * advice.parameters
    assert dense.link_s == pytest.approx(8e-6 * 1.5 * handed + buffers_s, abs=0.02)
    assert advice.recommendation.prediction.method.kind in ("top-Q", "PowerSGD", "local steps")
    gc.collect()  # what is left must not depend on when Python last looked
    left = [one for one in gc.get_objects() if type(one) is DistributedDataParallel]
    assert left == []
    torch.autograd.backward(loss(model))


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({}, RuntimeError, "no process group to measure a link of"),
        ({"latency_s": 0.1}, ValueError, "latency_s=0.1 without bandwidth_bits_per_s"),
        ({"world_size": 4}, ValueError, "world_size=4 without bandwidth_bits_per_s"),
        ({"bandwidth_bits_per_s": -1.0}, ValueError, "bandwidth_bits_per_s=-1.0"),
        ({"bandwidth_bits_per_s": 1e9, "qs": (1.5,)}, ValueError, "qs=1.5"),
        ({"bandwidth_bits_per_s": 1e9, "value_formats": ("int3",)}, ValueError, "int3"),
        ({"bandwidth_bits_per_s": 1e9, "every": 1}, ValueError, "every=1"),
        ({"bandwidth_bits_per_s": 1e9, "compute_s": -1.0}, ValueError, "compute_s=-1.0"),
        ({"bandwidth_bits_per_s": 1e9, "budget_s": 0.0}, ValueError, "budget_s=0.0"),
    ],
)
def test_what_is_out_of_place_is_named(
    wrong: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        advise(*build(), **wrong)


def test_a_loss_that_is_not_finite_is_refused_and_the_model_is_as_before() -> None:
    model, _, optimizer = build()
    before = [one.detach().clone() for one in model.parameters()]
    with pytest.raises(ValueError, match="expected a finite loss"):
        advise(
            model,
            lambda wrapped: wrapped(torch.full((8, WIDTH), torch.nan)).sum(),
            optimizer,
            bandwidth_bits_per_s=1e9,
        )
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


def test_a_model_that_no_method_can_wrap_is_refused() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    _, loss, optimizer = build()
    with pytest.raises(ValueError, match="no trainable parameter"):
        advise(frozen, loss, optimizer, bandwidth_bits_per_s=1e9)
    with pytest.raises(TypeError, match="model is a str"):
        advise("model", loss, optimizer, bandwidth_bits_per_s=1e9)  # type: ignore[arg-type]
