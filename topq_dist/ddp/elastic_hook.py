"""The hook in an elastic run: it exchanges in a group of its own, which is made anew.

DistributedDataParallel holds one process group for good, and one that has lost a rank is broken;
so it is given a group of its process alone, and the hook is all that exchanges. Gradients travel as
one vector, in the order of the model's parameters: DistributedDataParallel makes its buckets anew
after its first backward pass, which a rank that comes in has later than the others. It is a copy,
so that after a void exchange the step is exchanged once more, among those that are left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from topq_dist.compress.unsent import UnsentWatch
from topq_dist.elastic.membership import Membership
from topq_dist.elastic.settings import Elastic
from topq_dist.exchange.collectives import CommContext
from topq_dist.exchange.epochs import Epochs
from topq_dist.exchange.handed_state import check_travels, from_texts, to_texts
from topq_dist.exchange.registry import check_ranks, make_exchange
from topq_dist.hook.parts import HookParts, Knobs, Ranks, attach
from topq_dist.hook.pipeline import Pipeline, future_of
from topq_dist.optim.momentum_rules import sparsifier

_EXCHANGES = ("allgather", "hierarchical")
_METHODS = ("feedback", "optimizer")


class ElasticHook:
    """Exchanges of one rank's backward passes in an elastic run.

    Making one joins the run. Raises TypeError or ValueError for what cannot be elastic, before it
    does.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: Optimizer | None,
        parts: HookParts,
        knobs: Knobs,
        place: Elastic,
        context: CommContext,
    ) -> None:
        self._optimizer = _checked(model, optimizer, parts, knobs)
        check_ranks(parts.per_node, place.ranks)
        self._model = model.module
        self._parts = parts
        self._knobs = knobs
        self._held: list[tuple[Tensor, Sequence[Tensor], Future[Tensor]]] = []
        self._attached = False
        self.watch: UnsentWatch | None = None
        self.steps_taken = 0
        self.ranks: Ranks
        asked = f"exchange={knobs.exchange} ranks_per_node={parts.per_node}"
        tensors = [
            f"{name} {tuple(one.shape)} {one.dtype}" for name, one in self._tensors().items()
        ]
        settings = "\n".join([asked, parts.stages.compressor.settings(), parts.method, *tensors])
        membership = Membership(place, settings=settings, per_node=parts.per_node)
        self.epochs = Epochs(membership, self, context, settings)
        self.epochs.begin()

    def _tensors(self) -> dict[str, Tensor]:
        # not of its state_dict, which lacks buffers that are not persistent
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    def push(
        self, flat: Tensor, parameters: Sequence[Tensor], *, first: bool, last: bool
    ) -> Future[Tensor]:
        """Take the next bucket of a backward pass; all of them are exchanged with the last."""
        if first:
            self._held = []
        future = future_of(flat)
        self._held.append((flat, parameters, future))
        if not last:
            return future
        held, self._held = self._held, []
        # not before, or a newcomer would have no part in the step that is over
        self.epochs.begin_if_over()
        slices = _slices(held)
        ordered = [parameter for parameter in self._parts.names if parameter in slices]
        whole = torch.empty(0)

        def exchange() -> None:
            nonlocal whole
            whole = torch.cat([slices[parameter] for parameter in ordered])
            self.ranks.pipeline.watch = self.watch
            self.ranks.pipeline.push(whole, ordered, first=True, last=True)

        while not self.epochs.run(exchange, begins=False):
            pass
        self.steps_taken += 1
        averaged = torch.split(whole, [slices[parameter].numel() for parameter in ordered])
        for parameter, part in zip(ordered, averaged, strict=True):
            slices[parameter].copy_(part)
        for bucket, _, done in held:
            done.set_result(bucket)
        return future

    def enter(self, context: CommContext) -> None:
        """Exchange in this context from now on; a collective."""
        stages = self._parts.stages
        made = make_exchange(self._knobs.exchange, context, stages.compressor, self._parts.per_node)
        if not self._attached:
            attach(self._parts, self._knobs, rank=context.rank)
            self._attached = True
        pipeline = Pipeline(context, stages, made, self._parts.layouts, self.epochs.commit)
        self.ranks = Ranks(context, made, pipeline)

    def state_for_peer(self) -> dict[str, Any]:
        """Return what a rank takes that comes in; tensors are not copied."""
        stages = self._parts.stages
        return {
            "steps": self.steps_taken,
            "tensors": {name: tensor.detach() for name, tensor in self._tensors().items()},
            "optimizer": to_texts(self._optimizer.state_dict()),
            "density": stages.sparsity.state_dict(),
            "momentum": stages.momentum.state_dict(),
        }

    def take_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state_for_peer` has returned on a rank that is in the run."""
        stages = self._parts.stages
        for name, tensor in self._tensors().items():
            theirs = state["tensors"][name]
            if tensor.shape != theirs.shape:
                # a buffer that grows with what a run has seen
                tensor.resize_(theirs.shape)
            tensor.detach().copy_(theirs)
        self._optimizer.load_state_dict(
            from_texts(state["optimizer"], self._optimizer.state_dict())
        )
        stages.sparsity.load_state_dict(state["density"])
        stages.momentum.load_states([state], [state], state)
        stages.momentum.load_residuals({})
        self.steps_taken = state["steps"]

    def skip_exchanges_until(self, step: int) -> None:
        """Do nothing: of backward passes every rank has the same."""

    def close(self) -> None:
        """Leave the run, having let in who was promised a place."""
        if not self.epochs.membership.has_left:
            self.epochs.begin_if_over()
        self.epochs.close()


def _checked(
    model: DistributedDataParallel, optimizer: Optimizer | None, parts: HookParts, knobs: Knobs
) -> Optimizer:
    if model.process_group.size() > 1:
        raise ValueError(
            "elastic with a DistributedDataParallel among several ranks, whose group breaks with "
            "one of them: expected one among this process alone, after init_process_group('gloo', "
            "store=HashStore(), rank=0, world_size=1)"
        )
    if model.find_unused_parameters or model.static_graph:
        raise ValueError(
            "elastic with a DistributedDataParallel of find_unused_parameters or static_graph: "
            "expected one without, since it asks no other rank whether one has used a parameter, "
            "and ranks would step apart"
        )
    own = [
        name or "the model"
        for name, module in model.module.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]
    if own:
        raise ValueError(
            f"elastic with get_extra_state() of {', '.join(own)}, which cannot be handed to a rank "
            "that comes in: expected parameters and buffers alone"
        )
    found = sparsifier(optimizer)
    if optimizer is None or found is not None:
        said = "is a NoneType" if found is None else f"is or has a {type(found).__name__}"
        raise ValueError(
            f"optimizer {said} with elastic: expected the torch optimizer "
            "that steps the model, whose state a rank takes that comes in"
        )
    if knobs.exchange not in _EXCHANGES:
        raise ValueError(
            f"exchange={knobs.exchange!r} with elastic: expected one of {', '.join(_EXCHANGES)}"
        )
    if parts.method not in _METHODS:
        raise ValueError(
            f"momentum={parts.method!r} with elastic, which would be lost with a rank: expected "
            "'feedback' or 'optimizer'"
        )
    if knobs.scope != "parameter":
        raise ValueError(f"scope={knobs.scope!r} with elastic: expected 'parameter'")
    if parts.stages.scales_half:
        raise ValueError(
            "grad_scaler with elastic and parameters of float16, for which every rank must have "
            "the same loss scale: a rank that comes in has its own. Expected parameters of float32 "
            "(under torch.autocast) or bfloat16, or no GradScaler"
        )
    kinds = {(one.dtype, one.device) for one in parts.names if one.requires_grad}
    if len(kinds) > 1:
        raise ValueError(
            f"elastic with parameters of {sorted(map(str, kinds))}: expected one dtype and one "
            "device, since gradients travel as one vector"
        )
    check_travels(optimizer.state_dict())
    return optimizer


def _slices(
    held: Sequence[tuple[Tensor, Sequence[Tensor], Future[Tensor]]],
) -> dict[Tensor, Tensor]:
    """Return where in a bucket each parameter's gradient is."""
    found: dict[Tensor, Tensor] = {}
    for flat, parameters, _ in held:
        parts = torch.split(flat, [parameter.numel() for parameter in parameters])
        found |= dict(zip(parameters, parts, strict=True))
    return found
