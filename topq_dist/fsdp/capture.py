"""The gradients that fully_shard's reduce-scatters leave on this rank, parameter by parameter.

Its all-reduce hook is given one flat vector a module, the shards of those parameters that have a
gradient one behind the other, each padded to the longest rank's; it says no names. Right after it
fully_shard calls the post-accumulate hooks of these parameters, in order: they say which they were.
Meanwhile it adds zeros to their gradients, since the average is not there until the pass is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from topq_dist.dtypes import local_part
from topq_dist.fsdp.sharded import ShardedModules
from topq_dist.fsdp.torch_side import (
    all_reduces,
    call_after_backward,
    check_is_root,
    divide_as_hsdp,
    divisors_after,
)


@dataclass(kw_only=True)
class Reduction:
    """A module's gradients, as one reduce-scatter has left them: one each time it was applied.

    flat: 1-D, the shards of `parameters`, each from its offset on, and padding.
    counts: whether the pass exchanges them, and does not only accumulate.
    without: the parameters that had no gradient before.
    replica_divisor: by what this is to be divided to be the mean over this replica's ranks.
    sum_divisor: by what the sum over all replicas is to be divided to be the mean over all ranks.
    """

    module: FSDPModule
    flat: Tensor
    counts: bool
    without: set[Tensor]
    replica_divisor: float
    sum_divisor: float
    parameters: dict[Tensor, int] = field(default_factory=dict)
    read: int = 0

    def shard(self, parameter: Tensor) -> Tensor:
        """Return a parameter's shard, 1-D and sharing memory."""
        start = self.parameters[parameter]
        return self.flat[start : start + local_part(parameter).numel()]


class Capture:
    """Takes the gradients of a backward pass out of fully_shard's hands until they are averaged.

    names: of the sharded parameters. replicas: how many there are. at_end: called with this
    once a pass that has taken some is over.
    """

    def __init__(
        self,
        root: FSDPModule,
        modules: ShardedModules,
        names: Mapping[Tensor, str],
        replicas: int,
        at_end: Callable[[Capture], None],
    ) -> None:
        self._root = root
        self._names = names
        self._replicas = replicas
        self._at_end = at_end
        self._open: Reduction | None = None
        self._taken: list[Reduction] = []
        # of passes under set_requires_all_reduce(False)
        self._accumulated: dict[Tensor, Tensor] = {}
        self._stream: Any = None
        self._listening: set[Tensor] = set()
        for module, own in modules.all():
            divide_as_hsdp(module, replicas)
            module.set_all_reduce_hook(partial(self._on_reduced, module, own))
        for parameter in names:
            self._listen(parameter)
        call_after_backward(root, self._on_end)

    def take(self) -> list[Reduction]:
        """Return what this pass has left, in order, and forget it."""
        self._check_all_found()
        taken, self._taken = self._taken, []
        return taken

    def stream(self) -> AbstractContextManager[Any]:
        """Return the context of the stream on which fully_shard has called its all-reduce hook."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait(self) -> None:
        """Have the current stream wait for that one."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _listen(self, parameter: Tensor) -> None:
        if parameter.requires_grad and parameter not in self._listening:
            self._listening.add(parameter)
            parameter.register_post_accumulate_grad_hook(self._on_parameter)  # type: ignore[no-untyped-call]

    def _on_reduced(self, module: FSDPModule, own: Sequence[Tensor], reduced: Tensor) -> None:
        self._check_all_found()
        check_is_root(self._root)
        for parameter in own:
            # one that was frozen at first
            self._listen(parameter)
        if reduced.is_cuda:
            self._stream = torch.cuda.current_stream(reduced.device)
        replica_divisor, sum_divisor = divisors_after(module, reduced.dtype, self._replicas)
        self._open = Reduction(
            module=module,
            flat=reduced.clone(),
            counts=all_reduces(module),
            without={one for one in own if one.grad is None},
            replica_divisor=replica_divisor,
            sum_divisor=sum_divisor,
        )
        if self._open.counts:
            self._taken.append(self._open)
        reduced.zero_()

    def _on_parameter(self, parameter: Tensor) -> None:
        reduced = self._open
        if reduced is None or reduced.read == reduced.flat.numel():
            # not fully_shard, but autograd: a loss that has sharded parameters in it themselves
            return
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or ()
        if len(hooks) > 1:
            raise RuntimeError(
                f"{self._names[parameter]} has a post-accumulate-grad hook, which would be called "
                "before its gradient is averaged between the replicas: expected none, so step "
                "optimizers after backward()"
            )
        reduced.parameters[parameter] = reduced.read
        reduced.read += padded_numel(parameter)
        shard = reduced.shard(parameter)
        accumulated = self._accumulated.pop(parameter, None)
        if accumulated is not None:
            shard += accumulated
        if not reduced.counts:
            self._accumulated[parameter] = shard
            if parameter in reduced.without:
                # zeros are not yet a gradient
                parameter.grad = None

    def _on_end(self) -> None:
        if self._taken:
            self._at_end(self)

    def _check_all_found(self) -> None:
        reduced, self._open = self._open, None
        if reduced is not None and reduced.read != reduced.flat.numel():
            raise RuntimeError(
                f"fully_shard has reduced {reduced.flat.numel()} elements, of which the hook's "
                f"parameters make up {reduced.read}: expected the parameters that the model had "
                "when the hook was registered, so register it after whatever replaces them"
            )


def padded_numel(parameter: Tensor) -> int:
    """Return how many elements of a sharded parameter each rank has where all have the most."""
    assert isinstance(parameter, DTensor)  # noqa: S101 - for mypy: the names hold no others
    (placement,) = parameter.placements
    if placement.is_shard(0):
        rows = -(-parameter.shape[0] // parameter.device_mesh.size())
        return rows * prod(parameter.shape[1:])
    return parameter.to_local().numel()
