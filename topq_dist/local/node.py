"""The ranks that rounds go among, and those that train one copy of a model together beside them.

The latter are those of DistributedDataParallel, or of the mesh of DTensors. Rounds go between such
nodes: a group that has ranks of one mesh in it would average different shards.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from topq_dist.elastic.group import WatchedGroup
from topq_dist.module_names import unwrapped

_REMEDY = (
    "make a mesh with a dimension across the nodes, give fully_shard the others, as mesh['shard'], "
    "and LocalTopQ process_group=mesh.get_group('across')"
)


def node_group(model: object, group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """Return the ranks that must decide as this one does, and are not in `group`; None without any.

    Also None for what `check_group` refuses. May be a collective of them.
    """
    nodes = _nodes(model)
    if len(nodes) != 1:
        return None
    (ranks,) = nodes
    if len(ranks) == 1 or set(ranks) & _members(group) != {dist.get_rank()}:
        return None
    return nodes[ranks] or dist.new_group(list(ranks), use_local_synchronization=True)


def check_group(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Raise ValueError where `group` cannot be the one that rounds go among."""
    nodes = _nodes(model)
    if len(nodes) > 1:
        raise ValueError(
            f"the model's parameters are on several sets of ranks, {sorted(nodes)}: expected one "
            "mesh for all of them, or DistributedDataParallel around whole parameters"
        )
    for ranks in nodes:
        both = sorted(set(ranks) & _members(group))
        if both == [dist.get_rank()]:
            continue
        if not isinstance(unwrapped(model), DistributedDataParallel):
            raise ValueError(
                f"process_group has the ranks {both} of those that hold this model's shards, "
                f"{list(ranks)}, so that different shards would be averaged: expected the ranks "
                f"that hold the same shard as this one, so {_REMEDY}"
            )
        if len(both) < len(ranks) or set(ranks) == _members(group):
            raise ValueError(
                "process_group has the ranks that DistributedDataParallel averages gradients among "
                "at every step: expected the group across the nodes, and DistributedDataParallel "
                "with process_group= those of one node"
            )


def _nodes(model: object) -> dict[tuple[int, ...], dist.ProcessGroup | None]:
    """Return each set of ranks that has parts of a model, and its group where there is one."""
    nodes: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    if not isinstance(model, nn.Module):
        return nodes
    module = unwrapped(model)
    if isinstance(module, DistributedDataParallel):
        nodes[tuple(sorted(_members(module.process_group)))] = module.process_group
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
            nodes[ranks] = mesh.get_group() if mesh.ndim == 1 else None
    return nodes


def _members(group: dist.ProcessGroup) -> set[int]:
    return set(dist.get_process_group_ranks(group))


def group_alone(process_group: dist.ProcessGroup | None) -> WatchedGroup:
    """Return a group of this process, until it is in the run."""
    if process_group is not None:
        raise ValueError(
            f"process_group={process_group!r} with elastic: expected None, since an elastic run "
            "makes its group itself, and anew"
        )
    return WatchedGroup(dist.HashStore(), 0, 1, "topq/alone", _fine)


def _fine() -> None:
    """Find the only member in the run."""


def averaging_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return the group that averages, None being the default one; raises where it is none."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("no process group: expected init_process_group before LocalTopQ")
    found = group or dist.group.WORLD
    if not isinstance(found, dist.ProcessGroup):
        raise ValueError(
            f"process_group={group!r}: expected a group that this process is a member of"
        )
    return found
