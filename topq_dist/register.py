"""One way to register the hook, whatever a model is wrapped in."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Unpack, overload

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from topq_dist.ddp.hook import TopQState, topq_hook
from topq_dist.elastic.settings import Elastic
from topq_dist.hook.parts import KnobOptions
from topq_dist.module_names import check_not_fsdp1, unwrapped

if TYPE_CHECKING:
    from topq_dist.fsdp.hook import ShardedTopQState


@overload
def register_topq_hook(
    ddp_model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    replicate_group: None = None,
    elastic: bool | Elastic = False,
    **knobs: Unpack[KnobOptions],
) -> TopQState: ...


@overload
def register_topq_hook(
    ddp_model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    replicate_group: dist.ProcessGroup,
    **knobs: Unpack[KnobOptions],
) -> ShardedTopQState: ...


def register_topq_hook(
    ddp_model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    replicate_group: dist.ProcessGroup | None = None,
    elastic: bool | Elastic = False,
    **knobs: Unpack[KnobOptions],
) -> TopQState | ShardedTopQState:
    """Make a model exchange only the top-Q part of its gradients, and return the hook's state.

    ddp_model: wrapped in DistributedDataParallel; or under fully_shard (FSDP2) on the mesh of its
        shards, when frames go between the replicas, over `replicate_group`.
    replicate_group: the ranks that hold the same shard as this one, each in another replica:
        `mesh.get_group("replicate")` where fully_shard was given `mesh["shard"]`. None with
        DistributedDataParallel.

    Takes TopQState's knobs and raises what it raises, before anything is touched; a model takes
    one communication hook, once. A collective: call it on every rank.

    Give it the optimizer that steps the model, whose momentum it then takes out while it sends
    little: a momentum behind error feedback breaks training. Without one, set it by hand, for SGD
    momentum 0 and the rate divided by 1 - momentum, for Adam and its kind beta1 = 0.
    """
    model = unwrapped(ddp_model) if isinstance(ddp_model, nn.Module) else ddp_model
    if _is_sharded(model):
        if elastic is not False:
            raise ValueError(
                f"elastic={elastic!r} with a model under fully_shard: expected False, since with a "
                "rank its shards are lost"
            )
        # it brings along what only its users have imported
        from topq_dist.fsdp.hook import register

        return register(model, optimizer, replicate_group=replicate_group, **knobs)
    if replicate_group is not None:
        raise ValueError(
            f"replicate_group with a {type(model).__name__}: expected a model under fully_shard"
        )
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"ddp_model is a {type(ddp_model).__name__}: expected a DistributedDataParallel model; "
            "where another wraps it (a trainer, replicate()), give TopQState(model, ...) and "
            "topq_hook to what calls register_comm_hook"
        )
    state = TopQState(model, optimizer, elastic=elastic, **knobs)
    model.register_comm_hook(state, topq_hook)
    return state


def _is_sharded(model: nn.Module) -> bool:
    """Return whether fully_shard was applied to a model, or to a module within."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None or not isinstance(model, nn.Module):
        return False
    if isinstance(model, DistributedDataParallel):
        return False
    check_not_fsdp1(model)
    return any(isinstance(module, kind) for module in model.modules())
