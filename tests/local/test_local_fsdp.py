"""Local steps between two nodes in each of which fully_shard has divided the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hook_cases import small_model
from local_cases import backward, equal, inner_optimizer, local, train
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from topq_dist import LocalTopQ

pytestmark = [pytest.mark.gloo, pytest.mark.usefixtures("one_thread")]
CASES: dict[str, dict[str, Any]] = {
    "averages": {"every": 2, "q": 0.0},
    "sparse": {"every": 2, "q": 0.8},
    "streamed": {"every": 3, "q": 0.8, "fragments": 3, "overlap": 1},
}


def whole(model: nn.Module) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        tensors[name] = parameter.full_tensor().detach()
    return tensors


def sharded(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("across", "shard"))
    results: dict[str, Any] = {}
    for case, options in CASES.items():
        model = small_model(seed=0)
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh["shard"])
        fully_shard(model, mesh=mesh["shard"])
        # other numbers on each rank, of which the first of the group across gives its own
        torch.manual_seed(rank)
        steps = LocalTopQ(
            model, inner_optimizer(model), process_group=mesh.get_group("across"), **options
        )
        train(model, steps, rank, 0, 4)
        saved, optimizer = steps.state_dict(), copy.deepcopy(steps.optimizer.state_dict())
        train(model, steps, rank, 4, 6)
        ends = whole(model)
        steps.load_state_dict(saved)
        steps.optimizer.load_state_dict(optimizer)
        train(model, steps, rank, 4, 6)
        results[f"{case}, resumed"] = equal(whole(model), ends)
        steps.synchronize()
        results[case] = whole(model)
        results[f"{case}, ratio"] = steps.stats().ratio
    return results


def alone(rank: int) -> dict[str, Any]:
    """Do on one rank what a node of two does."""
    results: dict[str, Any] = {}
    for case in ("averages",):
        model, steps = local(0, **CASES[case])
        for step in range(6):
            totals: list[Tensor] = []
            for place in (2 * rank, 2 * rank + 1):
                backward(model, step, place)
                grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                totals = [t + g for t, g in zip(totals, grads, strict=True)] if totals else grads
            for parameter, total in zip(model.parameters(), totals, strict=True):
                parameter.grad = total / 2
            steps.step()
        results[case] = {name: one.detach() for name, one in model.named_parameters()}
    return results


def test_shards_are_exchanged_between_the_nodes(tmp_path: Path) -> None:
    ranks = run_ranks(4, sharded, tmp_path)
    reference = run_ranks(2, alone, tmp_path / "alone")[0]
    for result in ranks:
        for case in CASES:
            assert result[f"{case}, resumed"], case
            assert equal(result[case], ranks[0][case])
        for name, expected in reference["averages"].items():
            torch.testing.assert_close(result["averages"][name], expected, rtol=1e-5, atol=1e-6)
        assert result["sparse, ratio"] > 5
