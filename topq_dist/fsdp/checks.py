"""Checks of a model and its ranks before it takes the hook: each refusal with its remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from topq_dist.dtypes import FLOATS, local_part
from topq_dist.exchange.agreement import gather_texts
from topq_dist.exchange.collectives import CommContext
from topq_dist.fsdp.sharded import shard_group
from topq_dist.fsdp.torch_side import check_known, groups_of, sharded_modules
from topq_dist.hook.parts import Knobs
from topq_dist.optim.momentum_rules import sparsifier
from topq_dist.q_policies import QPolicy
from topq_dist.validation import warn_caller

_MESHES = (
    "make a 2-D mesh, give fully_shard its mesh['shard'], and the hook "
    "replicate_group=mesh.get_group('replicate')"
)


def check_model(model: nn.Module) -> FSDPModule:
    """Return `model`, or raise TypeError unless fully_shard was applied to it."""
    if not isinstance(model, FSDPModule):
        raise TypeError(
            f"model is a {type(model).__name__}: expected one that fully_shard was applied to, "
            "and not to modules within it alone"
        )
    check_known(model)
    return model


def check_meshes(names: Mapping[Tensor, str]) -> None:
    """Raise ValueError unless all parameters are sharded over the ranks of one 1-D mesh."""
    if not names:
        raise ValueError("model has no parameter that is sharded: expected one at least")
    for parameter, name in names.items():
        assert isinstance(parameter, DTensor)  # noqa: S101 - for mypy: the names hold no others
        _check_mesh(parameter, name)
    groups = {tuple(dist.get_process_group_ranks(shard_group(one))) for one in names}
    if len(groups) > 1:
        raise ValueError(
            f"the model's parameters are sharded over different ranks, {sorted(groups)}: expected "
            "one mesh for every fully_shard"
        )


def check_parameters(root: FSDPModule, names: Mapping[Tensor, str]) -> None:
    """Raise ValueError or TypeError, naming it, for a parameter that the hook cannot take."""
    if not any(parameter.requires_grad for parameter in names):
        raise ValueError("model has no trainable parameter that is sharded: expected one at least")
    for module in sharded_modules(root):
        groups_here = groups_of(module)
        if len(groups_here) > 1:
            raise ValueError(
                f"a {type(module).__name__} has parameters on several meshes, by its "
                "shard_placement_fn: expected one mesh for every fully_shard"
            )
        if any(getattr(group, "_all_reduce_hook", None) is not None for group in groups_here):
            raise ValueError(
                f"a {type(module).__name__} has an all-reduce hook already: expected a model "
                "without one"
            )
    for parameter, name in names.items():
        assert isinstance(parameter, DTensor)  # noqa: S101 - for mypy: the names hold no others
        if parameter.to_local().is_meta:
            raise TypeError(f"{name} is on the meta device: give it memory with to_empty()")
        if parameter.dtype not in FLOATS:
            known = ", ".join(str(dtype) for dtype in FLOATS)
            raise TypeError(
                f"{name} has dtype {parameter.dtype}: expected a real floating-point parameter, "
                f"one of {known}"
            )
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name} has a post-accumulate-grad hook, which would be called before its "
                "gradient is averaged between the replicas: step optimizers after backward()"
            )


def _check_mesh(parameter: DTensor, name: str) -> None:
    if any(placement.is_replicate() for placement in parameter.placements):
        raise ValueError(
            f"{name} is replicated by fully_shard or replicate() itself, which all-reduce whole "
            f"gradients between the replicas before any hook: {_MESHES}"
        )
    if parameter.device_mesh.ndim > 1:
        raise ValueError(
            f"{name} is sharded over a mesh of {parameter.device_mesh.ndim} dimensions: expected "
            "fully_shard on a 1-D mesh alone, without tensor or expert parallelism"
        )


def check_replicate_group(
    replicate_group: dist.ProcessGroup | None, shards: dist.ProcessGroup
) -> dist.ProcessGroup:
    """Return the group of the replicas, or raise TypeError or ValueError, saying what to give."""
    if replicate_group is None:
        raise ValueError(
            "replicate_group=None for a model under fully_shard: expected the ranks that hold the "
            "same shard in other replicas, among whom frames go. A model that is sharded over all "
            f"ranks has no replicas, and nothing that could be sent sparsely: {_MESHES}"
        )
    if isinstance(replicate_group, DeviceMesh):
        raise TypeError("replicate_group is a DeviceMesh: expected its get_group()")
    if not isinstance(replicate_group, dist.ProcessGroup):
        # what new_group returns to ranks that are not in it is no group either
        raise TypeError(
            f"replicate_group is {replicate_group!r}: expected a process group that this rank is in"
        )
    replicas = dist.get_process_group_ranks(replicate_group)
    sharded = dist.get_process_group_ranks(shards)
    both = sorted(set(replicas) & set(sharded))
    if both != [dist.get_rank()]:
        raise ValueError(
            f"replicate_group has the ranks {replicas}, and this rank's shards are on {sharded}: "
            f"expected no rank but this one in both, so {_MESHES}"
        )
    return replicate_group


def check_knobs(knobs: Knobs, optimizer: Optimizer | None) -> None:
    """Raise ValueError for a knob that has no meaning for shards."""
    found = sparsifier(optimizer)
    if found is not None:
        raise ValueError(
            f"optimizer is or has a {type(found).__name__}, which takes no DTensor: give the hook "
            "the optimizer without it, and q"
        )
    if isinstance(knobs.q, QPolicy):
        raise ValueError(
            f"q={knobs.q!r} for a model under fully_shard: expected a number, which "
            "`state.q = ...` changes between steps"
        )
    if knobs.scope != "parameter":
        raise ValueError(
            f"scope={knobs.scope!r} for a model under fully_shard: expected 'parameter', since "
            "parameters that no rank uses in a step cannot be told apart in a bucket"
        )
    if knobs.exchange == "hierarchical":
        raise ValueError(
            "exchange='hierarchical' for a model under fully_shard: expected another, since "
            "fully_shard adds up gradients inside of a replica already"
        )


def places_of_shards(context: CommContext) -> list[str]:
    """Return the place that each shard of this replica has among its replicas; a collective."""
    assert context.shards is not None  # noqa: S101 - for mypy: made with them
    place = f"{context.rank} of {context.size}"
    return gather_texts(place, group=context.shards, device=context.device)


def check_places(places: Sequence[str]) -> None:
    """Raise ValueError unless all shards of this replica have one place, see `places_of_shards`."""
    if len(set(places)) > 1:
        raise ValueError(
            f"replicate_group numbers this replica differently on its shards, {places}: expected "
            "the groups of one 2-D mesh"
        )


def warn_of_different_replicas(names: Mapping[Tensor, str], context: CommContext) -> None:
    """Warn where replicas begin apart; a collective of theirs."""
    sums = [float(local_part(one.detach()).double().abs().sum()) for one in names]
    texts = gather_texts(str(sums), group=context.group, device=context.device)
    if len(set(texts)) > 1:
        warn_caller(
            "the replicas begin with different parameters, and would stay apart, since gradients "
            "are all that they exchange: load or broadcast the same ones on all of them"
        )
