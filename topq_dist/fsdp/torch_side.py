"""Of fully_shard's own side: what its public methods do not say, each read in one place.

torch may change what is private to it; then what is missing is named when the hook is registered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from topq_dist.exchange.dense import AVERAGED

_END = "_root_post_backward_final_callback"


def sharded_modules(root: FSDPModule) -> list[FSDPModule]:
    """Return the modules that fully_shard was applied to, `root` first: one for each call."""
    found: list[FSDPModule] = [
        one for one in cast("nn.Module", root).modules() if isinstance(one, FSDPModule)
    ]
    return list({id(_state(one)): one for one in reversed(found)}.values())[::-1]


def own_parameters(module: FSDPModule) -> Iterator[Tensor]:
    """Yield the parameters of a module that are in no fully_shard of their own.

    Those of other modules that were given to the same call are among them.
    """
    seen: set[Tensor] = set()
    waiting: list[Any] = list(getattr(_state(module), "_modules", (module,)))
    while waiting:
        one: nn.Module = waiting.pop(0)
        for parameter in one.parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield parameter
        waiting = [c for c in one.children() if not isinstance(c, FSDPModule)] + waiting


def check_known(root: FSDPModule) -> None:
    """Raise RuntimeError where this torch's fully_shard lacks what the hook goes by."""
    state = _state(root)
    for holder, names in ((state, (_END, "_mp_policy")), (FSDPModule, ("set_all_reduce_hook",))):
        for name in names:
            if not hasattr(holder, name):
                raise RuntimeError(
                    f"fully_shard of torch {torch.__version__} has no {name}: expected that of "
                    "torch 2.13, which the hook was made for"
                )


def check_is_root(root: FSDPModule) -> None:
    """Raise RuntimeError where a model that is in use turns out to be a part of another one."""
    if getattr(_state(root), "_is_root", None) is False:
        raise RuntimeError(
            f"the hook was given a {type(root).__name__}, which is part of a larger model under "
            "fully_shard: expected the outermost one"
        )


def groups_of(module: FSDPModule) -> list[Any]:
    """Return the groups in which a module's own parameters are gathered and reduced."""
    state = _state(module)
    groups: list[Any] | None = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        one = state._fsdp_param_group
        groups = [] if one is None else [one]
    return list(groups)


def all_reduces(module: FSDPModule) -> bool:
    """Return what set_requires_all_reduce has said last."""
    return all(getattr(group, "all_reduce_grads", True) for group in groups_of(module))


def reduced_dtype(module: FSDPModule, parameter: Tensor) -> torch.dtype:
    """Return the dtype in which the gradient of a parameter is reduced."""
    policy = _state(module)._mp_policy
    dtype: torch.dtype = policy.reduce_dtype or policy.param_dtype or parameter.dtype
    return dtype


def divide_as_hsdp(module: FSDPModule, replicas: int) -> None:
    """Have sums in a dtype that overflows be divided as fully_shard does among so many replicas.

    By the number of all ranks, before the reduce-scatter and after the hook; else it would be that
    of a replica's. A factor that the user has set stays.
    """
    some = next((one for one in own_parameters(module) if isinstance(one, DTensor)), None)
    if some is None or reduced_dtype(module, some) in AVERAGED:
        return
    size = some.device_mesh.size()
    # of one rank alone fully_shard divides twice
    if size > 1 and all(group.gradient_divide_factor is None for group in groups_of(module)):
        module.set_gradient_divide_factor(float(size * replicas))


def divisors_after(module: FSDPModule, dtype: torch.dtype, replicas: int) -> tuple[float, float]:
    """Return by what is to be divided what fully_shard's all-reduce hook is given, for which mean.

    For that over a replica's ranks: this replica's. For that over all: the mean over the replicas
    where the dtype is one that fully_shard has averaged, else the sum over them. A factor that is
    set divides the sum over all ranks, as on a mesh of replicas and shards.
    """
    (group,) = groups_of(module)
    sums = getattr(group, "force_sum_reduction_for_comms", False)
    factor = group.gradient_divide_factor
    if factor is None and dtype in AVERAGED and not sums:
        return 1.0, 1.0
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
            _get_gradient_divide_factors,
        )

        _, after, *_ = _get_gradient_divide_factors(
            group._reduce_scatter_process_group, None, dtype, group.device.type, factor, sums
        )
    except (ImportError, AttributeError, TypeError) as error:
        raise RuntimeError(
            f"gradients are reduced in {dtype}, and how fully_shard of torch {torch.__version__} "
            "divides them then is not known: expected reduce_dtype=torch.float32 or bfloat16 in "
            "its MixedPrecisionPolicy, and neither set_force_sum_reduction_for_comms nor "
            "set_gradient_divide_factor"
        ) from error
    after = 1.0 if after is None else float(after)
    if factor is None:
        return after, after if dtype in AVERAGED else after * replicas
    # what follows is the replicas' mean, and the factor is of their sum
    of_mean = after / replicas
    return of_mean, of_mean if dtype in AVERAGED else after


def call_after_backward(root: FSDPModule, callback: Callable[[], None]) -> None:
    """Have `callback` called once fully_shard is done with a backward pass of `root`.

    Modules whose inputs need no gradient are reduced only then.
    """
    for module in sharded_modules(root):
        state = _state(module)
        setattr(state, _END, _AfterBackward(getattr(state, _END), callback))


class _AfterBackward:
    """fully_shard's last callback of a backward pass, and then another."""

    def __init__(self, inner: Callable[[], None], callback: Callable[[], None]) -> None:
        self._inner = inner
        self._callback = callback

    def __call__(self) -> None:
        self._inner()
        self._callback()


def _state(module: FSDPModule) -> Any:
    return module._get_fsdp_state()
