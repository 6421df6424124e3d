"""The end of a backward pass under fully_shard: what it has left becomes the replicas' average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from topq_dist.dtypes import local_part
from topq_dist.exchange.whole import AllReduceWhole
from topq_dist.fsdp.capture import Capture, Reduction
from topq_dist.fsdp.sharded import ShardedModules
from topq_dist.fsdp.shards import ShardFacts, ShardLayouts
from topq_dist.fsdp.torch_side import reduced_dtype
from topq_dist.hook.call_watch import CallWatch
from topq_dist.hook.parts import HookParts, Ranks


class PassEnd:
    """Averages what a backward pass has left on this rank, and adds it to the gradients.

    parts: of the hook, with `facts` and `layouts` among them.
    """

    def __init__(
        self,
        modules: ShardedModules,
        facts: ShardFacts,
        layouts: ShardLayouts,
        parts: HookParts,
        ranks: Ranks,
        calls: CallWatch,
    ) -> None:
        self._modules = modules
        self._facts = facts
        self._layouts = layouts
        self._stages = parts.stages
        self._ranks = ranks
        self._calls = calls

    @torch.no_grad()
    def exchange(self, capture: Capture) -> None:
        """Exchange what a backward pass has left, and add the averages to the gradients."""
        self._calls.close()
        reductions = capture.take()
        self._facts.note(reductions)
        with capture.stream():
            if self._reduces_whole():
                self._all_reduce(reductions)
            else:
                self._average(reductions)
        capture.wait()

    def _reduces_whole(self) -> bool:
        """Return whether the pass all-reduces gradients, and nothing else is done to them."""
        exchange = self._ranks.exchange
        return (
            isinstance(exchange, AllReduceWhole)
            and exchange.all_reduces_next
            and self._stages.clip_norm is None
            and not self._holds_residuals()
        )

    def _holds_residuals(self) -> bool:
        held = self._stages.compressor.residuals
        return not held.is_empty and any(
            held.holds(self._layouts.of(parameters)[0])
            for _, parameters in self._modules.trainable()
        )

    def _all_reduce(self, reductions: Sequence[Reduction]) -> None:
        """All-reduce each vector as fully_shard would, padding and all: its bits depend on it."""
        self._push([(one.flat, ()) for one in reductions])
        for one in reductions:
            if one.sum_divisor != 1.0:
                one.flat.div_(one.sum_divisor)
            for parameter in one.parameters:
                _add_to_gradient(parameter, one.shard(parameter))

    def _average(self, reductions: Sequence[Reduction]) -> None:
        """Average one vector a module, of the shards of all of its parameters."""
        gradients: dict[Tensor, Tensor] = {}
        for one in reductions:
            if one.replica_divisor != 1.0:
                one.flat.div_(one.replica_divisor)
            for parameter in one.parameters:
                shard = one.shard(parameter)
                if parameter in gradients:
                    gradients[parameter] += shard
                else:
                    gradients[parameter] = shard
        buckets = [
            (self._flat(module, parameters, gradients), parameters)
            for module, parameters in self._modules.trainable()
        ]
        self._push(buckets)
        for flat, parameters in buckets:
            layout, _ = self._layouts.of(parameters)
            for parameter, where in zip(parameters, layout.slices(), strict=True):
                if parameter in gradients:
                    _add_to_gradient(parameter, flat[where])

    def _push(self, buckets: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> None:
        last = len(buckets) - 1
        for number, (flat, parameters) in enumerate(buckets):
            self._ranks.pipeline.push(flat, parameters, first=number == 0, last=number == last)

    def _flat(
        self, module: FSDPModule, parameters: Sequence[Tensor], gradients: Mapping[Tensor, Tensor]
    ) -> Tensor:
        """Return a module's gradients as one vector, zeros where a parameter has none."""
        layout, _ = self._layouts.of(parameters)
        some = next((gradients[one] for one in parameters if one in gradients), None)
        dtype = reduced_dtype(module, parameters[0]) if some is None else some.dtype
        flat = torch.zeros(layout.numel, dtype=dtype, device=self._ranks.context.device)
        for parameter, where in zip(parameters, layout.slices(), strict=True):
            if parameter in gradients:
                flat[where] = gradients[parameter]
        return flat


def _add_to_gradient(parameter: Tensor, average: Tensor) -> None:
    if parameter.grad is not None:
        gradient = local_part(parameter.grad)
        gradient += average.to(gradient).view_as(gradient)
