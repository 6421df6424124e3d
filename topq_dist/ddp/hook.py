"""The DistributedDataParallel communication hook: what a user registers, tunes, saves and reads."""

# no `from __future__ import annotations` here: DistributedDataParallel reads the hook's annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from topq_dist.compress.defaults import DEFAULT_BOUND, DEFAULT_VALUE_FORMAT
from topq_dist.compress.sparsify.segments import Scope
from topq_dist.ddp.elastic_hook import ElasticHook
from topq_dist.ddp.hook_state import STATE_VERSION, SavedState, load_states, save_state
from topq_dist.ddp.model_checks import check_takes_hook, trainable_names
from topq_dist.ddp.parts import make_parts
from topq_dist.elastic.settings import Elastic, check_elastic
from topq_dist.exchange.collectives import CommContext
from topq_dist.exchange.epochs import LostResidual, check_saves_own
from topq_dist.exchange.gathered_states import gather_states
from topq_dist.exchange.registry import ExchangeName
from topq_dist.exchange.shards import telling_of_failures
from topq_dist.hook.call_watch import CallWatch
from topq_dist.hook.momentum import MomentumName
from topq_dist.hook.parts import Knobs, Ranks, agree_on_loaded, connect
from topq_dist.hook.sparsity_policy import OptimizerSparsity, PlannedSparsity
from topq_dist.hook.state import HookState
from topq_dist.module_names import unwrapped
from topq_dist.q_policies import QPolicy
from topq_dist.telemetry.stats import Meter


class TopQState(HookState):
    """State of `topq_hook` for one DistributedDataParallel model.

    Knobs, in the order in which one tunes them:
        optimizer: the torch optimizer that steps the model, whose momentum is then the hook's (see
            `momentum`). Of a TopQGradientOptimizer, which may be within others, the groups' q, dq
            and param_ndim are read live, and it leaves the hook's parameters unsparsified; one in
            a ChainedParamTransformingOptimizer is refused. None: set the momentum by hand, for
            SGD momentum 0 and the rate divided by 1 - momentum, for Adam and its kind beta1 = 0.
        q: fraction of each gradient that is not sent, in [0, 1]; DEFAULT_Q where None. Or a policy:
            QSchedule changes it with the steps, QByTensor from parameter to parameter, and QByLoss
            by what a step would lose. Not with a TopQGradientOptimizer. `state.q = ...` changes it
            between steps, on every rank alike.
        momentum: error feedback acts as a momentum, and one behind it breaks training. "feedback"
            takes the optimizer's out of its steps while the exchange is sparse (momentum 0 and
            SGD's rate divided by 1 - momentum, beta1 = 0; `register_momentum_rule` says how for
            others), and leaves it where everything, or half of it, is sent. Its groups always hold
            the user's own values, and are read at every step. "corrected" has the same momentum
            on each rank, before the selection (DGC): for SGD and optimizers with betas. "adam" has
            each rank send its own Adam direction, for torch's Adam and AdamW, which go along the
            average. "optimizer" leaves all as it is. None is "feedback" with an optimizer and
            error_feedback, else "optimizer". The others act once per backward pass that the hook
            sees: accumulate gradients under no_sync().
        error_feedback: keep what was not sent and add it to the next gradient.
        value_format: how the values sent travel: "fp32", "fp16", "bf16", "int8", "int4", "int2",
            "fp64", or entropy-coded: "ec2" (the bits of "int2" or fewer, less than half of its
            error), "ec1", "ecfp16" and "ecbf16" (the same numbers in fewer bits). What rounding
            loses is kept too. None is the gradient's own dtype, lossless, and the default without
            error_feedback.
        exchange: "allgather" sends every frame to every rank, exactly; "split" reduces each part
            of the index space on one rank, for many ranks; "hierarchical" sums inside a node and
            sends frames between nodes; "dense" sends all. "auto" measures them in the first
            steps, which train as "dense" does, and keeps the cheapest: "dense" where it is over
            5 % faster, else the one of fewest bytes among those not over 25 % slower than the
            fastest. It tries what would change a result, "split" and "dense", only with error
            feedback, "hierarchical" never.
        bound: clip what is sent to so many times the mean magnitude of what is sent of the same
            parameter (row with param_ndim, bucket with that scope), and keep what is clipped; None
            does not. What is half sent or more is never clipped. Only with error_feedback.
        scope: send the top-Q part of each "parameter", or of each "bucket" (fewer and larger
            selections; what is sent then depends on DDP's bucketing). Not with a
            TopQGradientOptimizer.
        clip_norm: scale this rank's gradient down to this norm before it is compressed. Its
            buckets then wait for the end of the backward pass, which knows the norm.
        grad_scaler: the GradScaler in use, so that the residual is in unscaled units. Gradients of
            float16 are then exchanged as fp32, without the scale, by "dense" at twice the bytes; a
            step whose average is too large for float16 with it is void, after which the scale must
            fall, as a GradScaler's does. Without one such an average is infinity on every rank, and
            what was sent of it is gone from the residuals, whether or not the step is skipped.
        ranks_per_node: for "hierarchical"; None is torchrun's LOCAL_WORLD_SIZE.
        mask_velocity: for momentum="corrected": forget the velocity of what has been sent. Only
            without it may more than half be sent that way.
        keep_rate: for momentum="feedback": what is not sent is applied later at the rate of the
            step it came from, not of the one that sends it: the residual is multiplied by what the
            rate (for SGD over 1 - momentum) has changed by, once that is over 5 %, and down to a
            twentieth of the highest rate there was; not down at once by over a third for an
            optimizer that remembers squares, as Adam, nor down at all for float16.
        adapt_rate: for momentum="feedback" with Adam, AdamW, NAdam, RAdam or RMSprop: multiply the
            rate (not the decoupled weight decay) of sparse steps by sqrt(1 + 2 c), where c is the
            coherence of gradients and residuals, a mean over recent steps, layers and ranks: 1 for
            gradients that are mostly noise, at most sqrt(1 / (1 - q)) where they agree for long.
        process_group: the ranks that train the model; None is the default group. Only where
            `ddp_model` is not wrapped yet, since DistributedDataParallel knows its own.
        elastic: go on where ranks are lost, and take in those that come back: an Elastic, or True
            for what the environment says (docs/elastic.md). With exchange "allgather" or
            "hierarchical", and a DistributedDataParallel among this process alone. A rank that
            comes in goes on at `steps_taken`; `close` leaves the run.

    ddp_model: the model, wrapped in DistributedDataParallel. Making the state is then a collective,
    which every rank of its process group enters at the same point; the group, what may go unused
    and what is frozen are read anew at each step. A model that is wrapped later, by a trainer or
    replicate(), is given as it is, and the state with `topq_hook` to whoever calls
    register_comm_hook (Lightning: ddp_comm_state= and ddp_comm_hook=). Ranks then agree in the
    first backward pass, until which `optimizer` may be set; each parameter may go unused.

    Raises TypeError or ValueError on bad input, and ExchangeError on every rank where ranks
    disagree on settings or model; nothing is touched before that.
    """

    def __init__(
        self,
        ddp_model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        q: float | QPolicy | None = None,
        momentum: MomentumName | None = None,
        error_feedback: bool = True,
        value_format: str | None = DEFAULT_VALUE_FORMAT,
        bound: float | None = DEFAULT_BOUND,
        exchange: ExchangeName = "auto",
        scope: Scope = "parameter",
        clip_norm: float | None = None,
        grad_scaler: GradScaler | None = None,
        ranks_per_node: int | None = None,
        mask_velocity: bool = True,
        keep_rate: bool = True,
        adapt_rate: bool = True,
        process_group: dist.ProcessGroup | None = None,
        elastic: bool | Elastic = False,
    ) -> None:
        place = check_elastic(elastic)
        if not isinstance(ddp_model, nn.Module):
            raise TypeError(
                f"ddp_model is a {type(ddp_model).__name__}: expected a DistributedDataParallel "
                "model, or the torch.nn.Module that is wrapped later"
            )
        knobs = Knobs(
            q=q,
            momentum=momentum,
            error_feedback=error_feedback,
            value_format=value_format,
            bound=bound,
            exchange=exchange,
            scope=scope,
            clip_norm=clip_norm,
            grad_scaler=grad_scaler,
            ranks_per_node=ranks_per_node,
            mask_velocity=mask_velocity,
            keep_rate=keep_rate,
            adapt_rate=adapt_rate,
        )
        super().__init__(knobs.usual(), optimizer, Meter())
        self._group = process_group
        self._loaded: SavedState | None = None
        # it, or the ranks: a state that has its ranks is held by its model
        self._model: nn.Module | None = None
        model = unwrapped(ddp_model)
        self._elastic: ElasticHook | None = None
        if not isinstance(model, DistributedDataParallel):
            if place is not None:
                raise ValueError(
                    "elastic with a model that is wrapped later: expected DistributedDataParallel"
                )
            self._model = model
            self._parts = make_parts(self._knobs, model, optimizer)
            self._calls = CallWatch(optimizer)
            return
        if process_group is not None:
            raise ValueError("process_group with a DistributedDataParallel model: expected None")
        check_takes_hook(model)
        device = next(iter(trainable_names(model))).device
        context = CommContext(group=model.process_group, device=device, meter=self._meter)
        with telling_of_failures(context):
            self._parts = make_parts(self._knobs, model, optimizer)
        if place is not None:
            self._elastic = ElasticHook(model, optimizer, self._parts, self._knobs, place, context)
            self._ranks = self._elastic.ranks
        else:
            self._ranks = connect(self._parts, self._knobs, context)
        # last: an optimizer that is refused is left as it was
        self._calls = CallWatch(optimizer)

    def _bind(self, device: torch.device) -> Ranks:
        """Return the ranks of the first backward pass; a collective of theirs."""
        group = self._group or dist.group.WORLD
        if group is None:
            raise RuntimeError("no process group: expected init_process_group before backward()")
        context = CommContext(group=group, device=device, meter=self._meter)
        self._ranks = connect(self._parts, self._knobs, context)
        self._model = None
        with telling_of_failures(context):
            if self._loaded is not None:
                self.load_state_dict(self._loaded)
        agree_on_loaded(self._loaded, context)
        # which may hold the residuals of every rank
        self._loaded = None
        return self._ranks

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that steps the model.

        It may be set until the first backward pass of a state that was made for a model which was
        not wrapped yet; ValueError later.
        """
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer | None) -> None:
        if self._model is None:
            raise ValueError(
                "optimizer is set too late: expected it before the first backward pass, and given "
                "to TopQState where the model is wrapped already"
            )
        self._parts = make_parts(self._knobs, self._model, optimizer)
        self._optimizer = optimizer
        self._calls.close()
        self._calls = CallWatch(optimizer)

    @property
    def q(self) -> float | QPolicy:
        """q as given, or set since; AttributeError where an optimizer's groups hold it."""
        return self._planned_sparsity().q

    @q.setter
    def q(self, value: float | QPolicy) -> None:
        self._planned_sparsity().q = value
        # of which an optimizer that is set later, and a copy, make theirs
        self._knobs = replace(self._knobs, q=value)

    def _planned_sparsity(self) -> PlannedSparsity:
        sparsity = self._parts.stages.sparsity
        if not isinstance(sparsity, PlannedSparsity):
            raise AttributeError("q lives in the optimizer's groups: use group['q']")
        return sparsity

    def __getstate__(self) -> dict[str, Any]:
        # so that a model that has the hook can be copied: a process group cannot
        if self._model is None:
            return {}
        if self._group is not None:
            raise RuntimeError(
                "process_group of a TopQState cannot be copied: expected a copy of one in the "
                "default group, or a state that is made anew"
            )
        return {
            "made_of": (self._model, self._optimizer, self._knobs),
            "loaded": self._loaded,
            "observes": self._watch is not None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        model, optimizer, knobs = state["made_of"]
        made = TopQState(model, optimizer, **vars(knobs))
        # of before they lack both
        made._loaded = state.get("loaded")
        if state.get("observes"):
            made.observe()
        vars(self).update(vars(made))

    def __getattr__(self, name: str) -> Any:
        # only where there is no such attribute
        if name.startswith("__"):
            raise AttributeError(name)
        if "_parts" in vars(self):
            # which says what it is: a property's own error has come here as well
            return object.__getattribute__(self, name)
        raise RuntimeError(
            "this TopQState is a copy and belongs to no process group: save state_dict() instead, "
            "and register a hook on a model that is made anew"
        )

    @property
    def steps_taken(self) -> int:
        """Backward passes that an elastic run has exchanged, those of before this rank came in too.

        ValueError in a run that is not elastic.
        """
        return self._elastic_hook().steps_taken

    @property
    def members(self) -> tuple[str, ...]:
        """Names of those in an elastic run now, by rank; none in another run."""
        return () if self._elastic is None else self._elastic.epochs.names

    @property
    def lost_residuals(self) -> tuple[LostResidual, ...]:
        """Ranks that an elastic run has lost so far, with what they had not sent."""
        return () if self._elastic is None else tuple(self._elastic.epochs.lost)

    def close(self) -> None:
        """Leave an elastic run, for good: the others go on without this rank at once."""
        if self._elastic is not None:
            self._elastic.close()

    def _elastic_hook(self) -> ElasticHook:
        if self._elastic is None:
            raise ValueError("steps_taken of a run that is not elastic: expected elastic=...")
        return self._elastic

    def push(
        self, flat: Tensor, parameters: Sequence[Tensor], *, first: bool, last: bool
    ) -> Future[Tensor]:
        """Take the next bucket of a backward pass: what `topq_hook` does."""
        self._calls.close()
        if self._elastic is not None:
            self._elastic.watch = self._watch
            future = self._elastic.push(flat, parameters, first=first, last=last)
            self._ranks = self._elastic.ranks
            return future
        ranks = self._ranks or self._bind(flat.device)
        group = self._parts.stages.model.group() if first else None
        if group is not None and group is not ranks.context.group:
            # a collective, as DDP's change of group is
            context = replace(ranks.context, group=group)
            ranks = self._ranks = connect(self._parts, self._knobs, context, ranks)
        if first:
            ranks.pipeline.watch = self._watch
        future = ranks.pipeline.push(flat, parameters, first=first, last=last)
        if last and isinstance(self._parts.stages.sparsity, OptimizerSparsity):
            self._parts.stages.sparsity.leave_to_hook()
        return future

    def state_dict(self, *, all_ranks: bool = False) -> dict[str, Any]:
        """Return what this rank needs to resume: residuals by parameter name, q (of a
        policy the step that it is at) or generator, what "auto" has chosen, totals.

        Tensors, numbers and strings only, so that torch.load(weights_only=True) reads it back.
        Each rank's is its own: save one a rank, or, with all_ranks=True, what this returns on rank
        0 of the group, which any number of ranks load. That is a collective, of room for all
        ranks' states on rank 0; the others get an empty dict.

        Raises RuntimeError before the first backward pass of a state whose ranks are not known.
        """
        if self._ranks is None:
            raise RuntimeError("this state has no ranks yet: expected a backward pass before it")
        state = save_state(self._parts, self._ranks)
        if self._elastic is not None:
            check_saves_own(all_ranks=all_ranks)
            state["lost_residuals"] = [one._asdict() for one in self.lost_residuals]
        if not all_ranks:
            return state
        return gather_states(state, self._ranks.context, version=STATE_VERSION)

    def load_state_dict(self, state: SavedState) -> None:
        """Resume from what the same rank's `state_dict` returned, or from those of all ranks.

        The states of all ranks are what `state_dict(all_ranks=True)` has returned, or a sequence of
        every rank's in rank order; world size or exchange may have changed since. Where neither
        has, each rank takes its own; else they go to the ranks that have residuals now, so that
        their sum stays what it was. Before the ranks are known a state is kept until they are.

        Raises ValueError or TypeError, and changes nothing, for what is no such state, is another
        model's, or for a single one of another rank, world size or number of ranks a node.
        """
        if self._elastic is not None:
            self._elastic.epochs.check_may_load(self._elastic.steps_taken)
        if self._ranks is None:
            self._loaded = state
        else:
            load_states(state, self._parts, self._ranks)


def topq_hook(state: TopQState, bucket: dist.GradBucket) -> Future[Tensor]:
    """Return a future of the bucket's average over the ranks, of which each sent its top-Q part.

    A DistributedDataParallel communication hook, for `model.register_comm_hook(state, topq_hook)`
    where `register_topq_hook` is too little. The result is written into the bucket's own buffer.

    Raises ExchangeError, on every rank, where ranks disagree on the settings or one has failed;
    DistributedDataParallel cannot go on after an error in backward(), so make the model anew.
    """
    if not isinstance(bucket, dist.GradBucket):
        raise TypeError(
            f"topq_hook was given a {type(bucket).__name__}: expected a bucket of "
            "DistributedDataParallel, not under torch._dynamo.config.optimize_ddp='python_reducer'"
        )
    return state.push(
        bucket.buffer(), bucket.parameters(), first=bucket.index() == 0, last=bucket.is_last()
    )
