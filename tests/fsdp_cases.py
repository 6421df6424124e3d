"""Models under fully_shard and what is asked of them, shared by the tests of its hook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from hook_cases import batch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from topq_dist import register_topq_hook
from topq_dist.dtypes import local_part
from topq_dist.fsdp.hook import ShardedTopQState

Before = Callable[[Any, int], None]


def mesh_of(replicas: int, shards: int) -> DeviceMesh:
    return init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))


class Nested(nn.Module):
    """Modules within modules, one applied twice and one not always, and parameters of its own."""

    def __init__(self, *, recomputes: bool = False, reentrant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(13, 12)
        inner = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        self.block = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), inner)
        self.further = nn.Linear(12, 12)
        self.never = nn.Linear(3, 3)
        self.last = nn.Linear(12, 5, bias=False)
        self.scale = nn.Parameter(torch.ones(5))
        self.uses_further, self.times = True, 2
        self.recomputes, self.reentrant = recomputes, reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for _ in range(self.times):
            if self.recomputes:
                hidden = checkpoint(self.block, hidden, use_reentrant=self.reentrant)
            else:
                hidden = self.block(hidden)
        if self.uses_further:
            hidden = hidden + self.further(hidden)
        out: Tensor = self.last(hidden) * self.scale
        return out


def nested(mesh: DeviceMesh, made_as: dict[str, bool] | None = None, **kw: Any) -> Any:
    model: Any = Nested(**made_as or {})
    for part in (model.block[2], model.block, model.further, model.never, model):
        fully_shard(part, mesh=mesh, **kw)
    return model


def plain(mesh: DeviceMesh, **kw: Any) -> Any:
    """A small chain, whose layers do not divide evenly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 10), nn.Tanh(), nn.Linear(10, 7), nn.Tanh())
    model.append(nn.Linear(7, 5))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh, **kw)
    return model


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def hooked(
    model: Any, mesh: DeviceMesh, optimizer: Optimizer | None = None, **knobs: Any
) -> ShardedTopQState:
    group = mesh.get_group("replicate")
    return register_topq_hook(model, optimizer, replicate_group=group, **knobs)


def train(
    model: Any,
    optimizer: Optimizer,
    steps: Sequence[int],
    *,
    before: Before | None = None,
    accumulates: int = 1,
    clips: bool = False,
) -> None:
    """Take steps, each on batches of this rank's own."""
    rank = dist.get_rank()
    for step in steps:
        if before is not None:
            before(model, step)
        for part in range(accumulates):
            if accumulates > 1:
                model.set_requires_gradient_sync(part == accumulates - 1)
            inputs, targets = batch(step * accumulates + part, rank)
            loss = nn.functional.cross_entropy(model(inputs).float(), targets)
            (loss / accumulates).backward()  # type: ignore[no-untyped-call]
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def locals_of(model: nn.Module) -> list[Tensor]:
    return [local_part(parameter.detach()).clone() for parameter in model.parameters()]


def equal(one: nn.Module, other: nn.Module) -> bool:
    """Return whether the shards of two models have the same bits on this rank."""
    pairs = zip(locals_of(one), locals_of(other), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def replicas_are_equal(model: nn.Module, mesh: DeviceMesh) -> bool:
    group = mesh.get_group("replicate")
    for mine in locals_of(model):
        theirs = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(theirs, mine, group=group)
        if not all(torch.equal(mine, one) for one in theirs):
            return False
    return True
