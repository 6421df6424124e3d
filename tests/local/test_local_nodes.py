"""Local steps between nodes: which groups fit a model in shards, and what all of a node decides."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from local_cases import equal, inner_optimizer, numbers
from ranks import error_of, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from topq_dist import LocalTopQ

pytestmark = [pytest.mark.gloo, pytest.mark.usefixtures("one_thread")]


def sharded(mesh: DeviceMesh, rows: int = 6) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, rows), nn.Linear(rows, 1))
    model[1].weight.requires_grad_(False)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def local(model: nn.Module, group: dist.ProcessGroup | None, **options: Any) -> LocalTopQ:
    usual: dict[str, Any] = {"every": 1, "q": 0.0, "process_group": group}
    return LocalTopQ(model, inner_optimizer(model), **(usual | options))


def here(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: one.to_local().detach().clone() if isinstance(one, DTensor) else one.detach().clone()
        for name, one in model.named_parameters()
    }


def moved(model: nn.Module, steps: LocalTopQ, rank: int, *, to: float | None = None) -> None:
    """Have an inner step change the shards of a rank, or put a number in the first one."""
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if parameter.requires_grad:
                local += 0.1 * (rank + 1)
        if to is not None:
            first = next(model.parameters())
            (first.to_local() if isinstance(first, DTensor) else first)[0, 0] = to
    steps.end_step()


def groups(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("across", "shard"))
    across, shards = mesh.get_group("across"), mesh.get_group("shard")
    crossed = [dist.new_group([0, 3]), dist.new_group([1, 2])][rank in (1, 2)]
    model = sharded(mesh["shard"])
    before = here(model)
    hsdp = sharded(mesh)
    torch.manual_seed(0)
    fsdp1 = FullyShardedDataParallel(nn.Linear(8, 8), device_id=torch.device("cpu"))
    plain = nn.Linear(2, 1)
    results: dict[str, Any] = {
        "all ranks": error_of(lambda: local(model, None)),
        "its shards": error_of(lambda: local(model, shards)),
        "other shards": error_of(lambda: local(model, crossed)),
        "HSDP": error_of(lambda: local(hsdp, across)),
        "FSDP1": error_of(lambda: local(fsdp1, across)),
        "half a node": error_of(
            lambda: local(DistributedDataParallel(plain), across)  # all four average gradients
        ),
        "untouched": equal(before, here(model)),
        "one alone is wrong": error_of(lambda: local(model, across, every=int(rank > 0))),
        "q": error_of(lambda: local(model, across, q=0.5 if rank == 0 else 0.6)),
        "q of a shard": error_of(lambda: local(model, across, q=0.5 if rank % 2 else 0.6)),
    }
    # rank 1 and 3 hold nothing of the second layer, and of the one-row model nothing at all
    few = sharded(mesh["shard"], rows=1)
    results["empty shards"] = error_of(lambda: moved(few, local(few, across), rank))
    return results


def test_a_group_with_other_shards_is_refused_on_every_rank(tmp_path: Path) -> None:
    for result in run_ranks(4, groups, tmp_path):
        for case in ("all ranks", "its shards", "HSDP"):
            assert result[case].startswith("ValueError: process_group has the ranks"), result[case]
            assert "mesh.get_group(" in result[case]
        assert result["other shards"].startswith("ExchangeError: ranks disagree")
        assert "of its mesh" in result["other shards"]
        assert result["FSDP1"].startswith("TypeError: model is a FullyShardedDataParallel")
        assert result["half a node"].startswith("ValueError: process_group has the ranks that Dist")
        assert result["untouched"]
        for case in ("one alone is wrong", "q", "q of a shard"):
            assert result[case].startswith(("ExchangeError", "ValueError: every=0")), result[case]
        assert "q=0.5" in result["q of a shard"]
        assert result["empty shards"] == "no error"


def nodes(rank: int) -> dict[str, Any]:
    """Have one of four ranks, in two nodes of two, disagree or overflow."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("across", "shard"))
    across, inside = mesh.get_group("across"), mesh.get_group("shard")
    results: dict[str, Any] = {}
    for kind in ("shards", "copies"):
        torch.manual_seed(0)
        if kind == "shards":
            model = sharded(mesh["shard"])
        else:
            plain = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))
            model = DistributedDataParallel(plain, process_group=inside)
        for options in ({}, {"overlap": 1, "every": 2}):
            steps = local(model, across, **options)
            every = options.get("every", 1)
            kept = steps.state_dict()["outer"]
            for step in range(every + options.get("overlap", 0)):
                moved(model, steps, rank, to=torch.nan if rank == 0 and step == 0 else None)
            results[f"{kind} {len(options)}"] = [
                steps.void_rounds,
                equal(kept, steps.state_dict()["outer"]),
            ]
            with torch.no_grad():
                for one in model.parameters():
                    (one.to_local() if isinstance(one, DTensor) else one).fill_(1.0)
        steps = local(model, across)
        if rank == 0:
            steps.q = 0.7
        before = time.perf_counter()
        results[f"{kind}, error"] = error_of(partial(moved, model, steps, rank))
        results[f"{kind}, at once"] = time.perf_counter() - before < 30
    return results


def test_what_one_rank_has_all_of_all_nodes_hear_of(tmp_path: Path) -> None:
    for result in run_ranks(4, nodes, tmp_path):
        for kind in ("shards", "copies"):
            assert result[f"{kind} 0"] == [1, True]
            assert result[f"{kind} 2"] == [1, True]
            assert result[f"{kind}, error"].startswith("ExchangeError"), result
            assert "q=0.7" in result[f"{kind}, error"]
            assert result[f"{kind}, at once"]


def starts(rank: int) -> dict[str, Any]:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    model.register_buffer("cache", torch.empty(0))
    model.register_buffer("phases", torch.randn(3, dtype=torch.complex64).conj())
    LocalTopQ(model, inner_optimizer(model), every=2, q=0.5)
    bare = nn.Linear(2, 1, bias=False)
    bare.register_buffer("cache", torch.empty(0))
    steps = LocalTopQ(bare, inner_optimizer(bare), every=1, q=0.5)
    moved(bare, steps, rank)
    return {**numbers(model), "bare": bare.weight.detach()}


def test_all_that_a_model_has_is_the_first_ranks_at_the_start(tmp_path: Path) -> None:
    first, second = run_ranks(2, starts, tmp_path)
    assert "0.weight" in first
    assert equal(first, second)
