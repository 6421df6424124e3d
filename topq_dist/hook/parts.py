"""What a hook is made of: by its knobs and its model first, then among the ranks that train it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypedDict

import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.defaults import (
    DEFAULT_BOUND,
    DEFAULT_VALUE_FORMAT,
    usual_bound,
    usual_value_format,
)
from topq_dist.compress.gpu import engine
from topq_dist.compress.gpu.shape import FORMATS
from topq_dist.compress.sparsify.segments import Scope
from topq_dist.exchange.base import Exchange
from topq_dist.exchange.collectives import CommContext
from topq_dist.exchange.dense import Dense
from topq_dist.exchange.registry import DeviceOptions, ExchangeName, check_ranks, make_exchange
from topq_dist.exchange.shards import check_same_on_all_shards, telling_of_failures
from topq_dist.exchange.whole import AllReduceWhole
from topq_dist.hook.loss_scale import LossScaleWatch, check_grad_scaler
from topq_dist.hook.momentum import MomentumName
from topq_dist.hook.momentum_choice import advise, check_momentum, make_momentum
from topq_dist.hook.pipeline import Pipeline
from topq_dist.hook.sparsity_policy import PlannedSparsity, SparsityPolicy
from topq_dist.hook.stages import Layouts, ModelFacts, Stages
from topq_dist.q_policies import QByLoss, QPolicy
from topq_dist.validation import check_positive


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What a user says of the hook; see TopQState."""

    q: float | QPolicy | None = None
    momentum: MomentumName | None = None
    error_feedback: bool = True
    value_format: str | None = DEFAULT_VALUE_FORMAT
    bound: float | None = DEFAULT_BOUND
    exchange: ExchangeName = "auto"
    scope: Scope = "parameter"
    clip_norm: float | None = None
    grad_scaler: GradScaler | None = None
    ranks_per_node: int | None = None
    mask_velocity: bool = True
    keep_rate: bool = True
    adapt_rate: bool = True

    def usual(self, *, q: object = None) -> Knobs:
        """Return these, lossless where what is lost would stay lost; q: see usual_value_format."""
        feedback = self.error_feedback
        return replace(
            self,
            value_format=usual_value_format(self.value_format, error_feedback=feedback, q=q),
            bound=usual_bound(self.bound, error_feedback=feedback),
        )


class KnobOptions(TypedDict, total=False):
    """The knobs as keywords; see TopQState."""

    q: float | QPolicy | None
    momentum: MomentumName | None
    error_feedback: bool
    value_format: str | None
    bound: float | None
    exchange: ExchangeName
    scope: Scope
    clip_norm: float | None
    grad_scaler: GradScaler | None
    ranks_per_node: int | None
    mask_velocity: bool
    keep_rate: bool
    adapt_rate: bool


class HookParts(NamedTuple):
    """What needs no other rank: `method` is the momentum meant, `names` those of all parameters."""

    optimizer: Optimizer | None
    names: dict[Tensor, str]
    per_node: int
    method: MomentumName
    stages: Stages
    layouts: Layouts


class WrappedModel(NamedTuple):
    """A model that takes the hook, as its wrapper knows it.

    names: of every parameter that it may exchange, those included that are frozen by now. half: of
    those whose gradients are of float16.
    """

    names: dict[Tensor, str]
    facts: ModelFacts
    sparsity: SparsityPolicy
    layouts: Layouts
    half: frozenset[str]


def assemble(
    knobs: Knobs, model: WrappedModel, optimizer: Optimizer | None, per_node: int
) -> HookParts:
    """Return a hook's parts for a model; raises TypeError or ValueError, having touched nothing.

    per_node: what `check_exchange` has returned.
    """
    names = model.names
    compressor = TopKCompressor(
        value_format=knobs.value_format,
        error_feedback=knobs.error_feedback,
        bound=knobs.bound,
    )
    method = check_momentum(
        knobs.momentum,
        optimizer,
        {parameter: name for parameter, name in names.items() if parameter.requires_grad},
        error_feedback=knobs.error_feedback,
        mask_velocity=knobs.mask_velocity,
        keep_rate=knobs.keep_rate,
        adapt_rate=knobs.adapt_rate,
    )
    momentum = make_momentum(
        method,
        optimizer,
        names,
        compressor.residuals,
        mask_velocity=knobs.mask_velocity,
        keep_rate=knobs.keep_rate,
        adapt_rate=knobs.adapt_rate,
        summed_ranks=per_node,
        half=model.half,
    )
    watches = knobs.error_feedback and knobs.exchange != "dense" and knobs.grad_scaler is None
    stages = Stages(
        model=model.facts,
        sparsity=model.sparsity,
        compressor=compressor,
        momentum=momentum,
        clip_norm=check_positive("clip_norm", knobs.clip_norm),
        grad_scaler=check_grad_scaler(knobs.grad_scaler),
        scales_half=bool(model.half) and knobs.grad_scaler is not None,
        scale_watch=LossScaleWatch() if watches else None,
    )
    return HookParts(optimizer, names, per_node, method, stages, model.layouts)


class Ranks(NamedTuple):
    """The ranks that train the model, and what carries its buckets among them."""

    context: CommContext
    exchange: Exchange
    pipeline: Pipeline


def connect(
    parts: HookParts, knobs: Knobs, context: CommContext, before: Ranks | None = None
) -> Ranks:
    """Return what carries buckets among the ranks of `context`; a collective of theirs.

    before: the ranks of earlier steps, whose place these take. Raises ValueError on a rank where
    the number of ranks does not fit, and ExchangeError on every rank where they disagree on
    settings or model, or one has failed.
    """
    with telling_of_failures(context):
        check_ranks(parts.per_node, context.size)
    model = [f"{n} {tuple(p.shape)} {p.dtype}" for p, n in parts.names.items() if p.requires_grad]
    chosen = None if before is None else before.exchange.chosen
    dense_steps = 0 if before is None else before.exchange.dense_steps
    asked = f"exchange={knobs.exchange} ranks_per_node={parts.per_node}"
    done = f"chosen={chosen} dense_steps={dense_steps}"
    on_device = _on_device(parts, knobs, context)
    if on_device is not None:
        done += f" {on_device}"
    settings = "\n".join([asked, done, parts.stages.settings(), *model])
    check_same_on_all_shards(settings, context)
    # only now: ranks that disagree would make groups that the others do not know of
    exchange = make_exchange(
        knobs.exchange,
        context,
        parts.stages.compressor,
        parts.per_node,
        on_device=on_device,
    )
    if context.shards is not None:
        dense = Dense(context, parts.stages.compressor, leaves_sums=True)
        exchange = AllReduceWhole(
            exchange, dense, lambda: knobs.exchange == "dense" or parts.stages.sends_all()
        )
    if before is None:
        attach(parts, knobs, rank=context.rank)
    elif exchange.can_choose(chosen):
        exchange.resume(chosen, dense_steps)
    else:
        exchange.resume(None, 0)
    return Ranks(context, exchange, Pipeline(context, parts.stages, exchange, parts.layouts))


def _on_device(parts: HookParts, knobs: Knobs, context: CommContext) -> DeviceOptions | None:
    """Return how frames are exchanged on the device, None where they go through the host.

    They do where something of a step is the host's: parameters that may be unused, momentum before
    the selection, rows of parameters, a q by the loss, values in a format that no kernel writes,
    averages that must fit float16 with a loss scale.
    """
    stages = parts.stages
    value_format = stages.compressor.value_format
    if (
        knobs.exchange not in ("allgather", "auto")
        or context.shards is not None
        or not isinstance(stages.sparsity, PlannedSparsity)
        or isinstance(stages.sparsity.q, QByLoss)
        or parts.method not in ("feedback", "optimizer")
        or stages.model.may_be_unused
        or stages.compressor.residual_decay != 1.0
        or stages.scales_half
        or not (value_format is None or value_format in FORMATS)
        or not engine.runs_on(context.device)
    ):
        return None
    # a coherence is the host's, which looks at every rank's before the step is over
    waits = dist.get_backend(context.group) == "gloo" or stages.momentum.needs_coherence
    return DeviceOptions(late=not waits)


def attach(parts: HookParts, knobs: Knobs, *, rank: int) -> None:
    """Get a hook ready for its first backward pass, and say so where a momentum is in its way."""
    parts.stages.momentum.attach()
    told = parts.optimizer is None and knobs.momentum == "optimizer"
    feeds_back = knobs.error_feedback and knobs.exchange != "dense"
    if parts.method == "optimizer" and feeds_back and not told:
        advise(parts.optimizer, parts.names, rank=rank)


def agree_on_loaded(loaded: object, context: CommContext) -> None:
    """Raise ExchangeError on every rank unless all have loaded a state, or none; a collective."""
    check_same_on_all_shards(f"a state was loaded: {loaded is not None}", context)
