"""The DistributedDataParallel communication hook: what a user registers, tunes, saves and reads."""

# no `from __future__ import annotations` here: DistributedDataParallel reads the hook's annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.defaults import DEFAULT_BOUND, DEFAULT_VALUE_FORMAT, usual_bound
from topq_dist.compress.sparsify.segments import Scope
from topq_dist.ddp.momentum import MomentumName
from topq_dist.ddp.momentum_choice import advise, check_momentum, make_momentum
from topq_dist.ddp.pipeline import Bucket, BucketLayouts, Pipeline, Stages
from topq_dist.ddp.sparsity_policy import FixedSparsity, make_sparsity_policy
from topq_dist.ddp.state_dict import STATE_VERSION, load_states
from topq_dist.ddp.validation import (
    check_grad_scaler,
    check_parameters,
    check_takes_hook,
    check_unused,
    exchanged_names,
    trainable_names,
)
from topq_dist.exchange.agreement import check_same_on_all_ranks, tell_of_failure
from topq_dist.exchange.collectives import CommContext
from topq_dist.exchange.registry import ExchangeName, check_exchange, make_exchange
from topq_dist.optim import TopQGradientOptimizer
from topq_dist.telemetry import Meter, Stats
from topq_dist.validation import check_fraction, check_positive


class TopQState:
    """State of `topq_hook` for one DistributedDataParallel model.

    Knobs, in the order in which one tunes them:
        optimizer: the torch optimizer that steps the model, whose momentum is then the hook's (see
            `momentum`). Of a TopQGradientOptimizer the groups' q, dq and param_ndim are read live,
            and it leaves the hook's parameters unsparsified. None: set the momentum by hand, for
            SGD momentum 0 and the rate divided by 1 - momentum, for Adam and its kind beta1 = 0.
        q: fraction of each gradient that is not sent, in [0, 1]; DEFAULT_Q where None. Not with a
            TopQGradientOptimizer. `state.q = ...` changes it between steps, on every rank alike.
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
            "fp64"; what rounding loses is kept too. None is the gradient's own dtype, lossless.
        exchange: "allgather" sends every frame to every rank, exactly; "split" reduces each part
            of the index space on one rank, for many ranks; "hierarchical" sums inside a node and
            sends frames between nodes; "dense" sends all. "auto" measures them in the first
            steps and keeps the cheapest: "dense" where it is over 5 % faster, else the one of
            fewest bytes among those not over 25 % slower than the fastest. It tries what would
            change a result, "split" and "dense", only with error feedback, "hierarchical" never.
        bound: clip what is sent to so many times the mean magnitude of what is sent of the same
            parameter (row with param_ndim, bucket with that scope), and keep what is clipped; None
            does not. What is half sent or more is never clipped. Only with error_feedback.
        scope: send the top-Q part of each "parameter", or of each "bucket" (fewer and larger
            selections; what is sent then depends on DDP's bucketing). Not with a
            TopQGradientOptimizer.
        clip_norm: scale this rank's gradient down to this norm before it is compressed. Its
            buckets then wait for the end of the backward pass, which knows the norm.
        grad_scaler: the GradScaler in use, so that the residual is in unscaled units.
        ranks_per_node: for "hierarchical"; None is torchrun's LOCAL_WORLD_SIZE.
        mask_velocity: for momentum="corrected": forget the velocity of what has been sent. Only
            without it may more than half be sent that way.
        adapt_rate: for momentum="feedback" with Adam, AdamW, NAdam, RAdam or RMSprop: multiply the
            rate (not the decoupled weight decay) of sparse steps by sqrt(1 + 2 c), where c is the
            coherence of gradients and residuals, a mean over recent steps, layers and ranks: 1 for
            gradients that are mostly noise, at most sqrt(1 / (1 - q)) where they agree for long.

    A collective: every rank of the model's process group makes its state at the same point.
    Raises TypeError or ValueError on bad input, and ExchangeError on every rank where ranks
    disagree on settings or model; nothing is touched before that.
    """

    def __init__(
        self,
        ddp_model: DistributedDataParallel,
        optimizer: Optimizer | None = None,
        *,
        q: float | None = None,
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
        adapt_rate: bool = True,
    ) -> None:
        check_takes_hook(ddp_model)
        self._names = trainable_names(ddp_model)
        self._exchanged_names = exchanged_names(ddp_model)
        self._meter = Meter()
        self._context = CommContext(
            group=ddp_model.process_group,
            device=next(iter(self._names)).device,
            meter=self._meter,
        )
        try:
            check_parameters(ddp_model, self._names)
            self._per_node = check_exchange(exchange, self._context, ranks_per_node)
            self._sparsity = make_sparsity_policy(self._names, optimizer, q=q, scope=scope)
            self._compressor = TopKCompressor(
                value_format=value_format,
                error_feedback=error_feedback,
                bound=usual_bound(bound, error_feedback=error_feedback),
            )
            method = check_momentum(
                momentum,
                optimizer,
                self._names,
                error_feedback=error_feedback,
                mask_velocity=mask_velocity,
                adapt_rate=adapt_rate,
            )
            may_be_unused = check_unused(ddp_model, scope)
            self._momentum = make_momentum(
                method,
                optimizer,
                self._names,
                self._compressor.residuals,
                mask_velocity=mask_velocity,
                adapt_rate=adapt_rate,
                skip_unused=may_be_unused,
                summed_ranks=self._per_node,
            )
            stages = Stages(
                sparsity=self._sparsity,
                compressor=self._compressor,
                momentum=self._momentum,
                clip_norm=check_positive("clip_norm", clip_norm),
                grad_scaler=check_grad_scaler(grad_scaler),
                may_be_unused=may_be_unused,
            )
        except Exception as error:
            tell_of_failure(error, group=self._context.group, device=self._context.device)
            raise
        model = [f"{name} {tuple(p.shape)} {p.dtype}" for p, name in self._names.items()]
        asked = f"exchange={exchange} ranks_per_node={self._per_node}"
        settings = "\n".join([asked, stages.settings(), *model])
        check_same_on_all_ranks(settings, group=self._context.group, device=self._context.device)
        # only now: ranks that disagree would make groups that the others do not know of
        self._exchange = make_exchange(exchange, self._context, self._compressor, self._per_node)
        self._pipeline = Pipeline(self._context, stages, self._exchange)
        self._momentum.attach()
        self._unpaired = optimizer if isinstance(optimizer, TopQGradientOptimizer) else None
        told = optimizer is None and momentum == "optimizer"
        if method == "optimizer" and error_feedback and exchange != "dense" and not told:
            advise(optimizer, self._names, rank=self._context.rank)
        self._layouts = BucketLayouts(self._exchanged_names)

    @property
    def q(self) -> float:
        """The q of every parameter; AttributeError where an optimizer's groups hold it."""
        return self._fixed_sparsity().q

    @q.setter
    def q(self, value: float) -> None:
        self._fixed_sparsity().q = check_fraction("q", value)

    def _fixed_sparsity(self) -> FixedSparsity:
        if not isinstance(self._sparsity, FixedSparsity):
            raise AttributeError("q lives in the optimizer's groups: use group['q']")
        return self._sparsity

    @property
    def chosen_exchange(self) -> str | None:
        """What exchange="auto" has chosen; None until it has, and where it was not asked to."""
        return self._exchange.chosen

    def __getstate__(self) -> dict[str, Any]:
        # so that a model that has the hook can be copied: a process group cannot
        return {}

    def __getattr__(self, name: str) -> NoReturn:
        # only where there is no such attribute
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(
            "this TopQState is a copy and belongs to no process group: save state_dict() instead, "
            "and register a hook on a model that is made anew"
        )

    def detach(self) -> None:
        """Hand the optimizer its momentum back for good; a second call does nothing.

        DistributedDataParallel keeps a hook, which goes on as with momentum="optimizer". Without
        this call the optimizer is as it was once the model and this state are gone.
        """
        self._momentum.detach()

    def stats(self) -> Stats:
        """Return this rank's totals so far."""
        return self._meter.stats

    def push(
        self, flat: Tensor, parameters: Sequence[Tensor], *, first: bool, last: bool
    ) -> Future[Tensor]:
        """Take the next bucket of a backward pass: what `topq_hook` does."""
        if self._unpaired is not None:
            # not before the hook is in use, or a hook that was refused would leave its mark
            self._unpaired.sparsified_elsewhere(self._names)
            self._unpaired = None
        bucket = Bucket(flat, self._layouts.of(parameters), parameters, Future())
        self._pipeline.push(bucket, first=first, last=last)
        return bucket.future

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank needs to resume: residuals by parameter name, q or generator,
        what "auto" has chosen, totals.

        Tensors, numbers and strings only, so that torch.load(weights_only=True) reads it back.
        Each rank's is its own: save one a rank.
        """
        return {
            **self._identity(),
            "residuals": self._momentum.residuals(),
            "momentum": self._momentum.state_dict(),
            "density": self._sparsity.state_dict(),
            "chosen_exchange": self.chosen_exchange,
            "dense_steps": self._exchange.dense_steps,
            "stats": vars(self._meter.stats).copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Resume from what the same rank's `state_dict` returned, or from those of all ranks.

        A sequence holds the states of every rank of the old run, in rank order, and world size or
        exchange may have changed since: they go to the ranks that have residuals
        now, so that their sum stays what it was.

        Raises ValueError or TypeError, and changes nothing, for what is no such state, is another
        model's, or for a single one of another rank, world size or number of ranks a node.
        """
        self._meter.stats = load_states(
            state,
            self._identity(),
            {name: tuple(p.shape) for p, name in self._exchanged_names.items()},
            feeds_back=self._compressor.error_feedback,
            momentum=self._momentum,
            sparsity=self._sparsity,
            exchange=self._exchange,
        )

    def _identity(self) -> dict[str, int]:
        return {
            "version": STATE_VERSION,
            "world_size": self._context.size,
            "rank": self._context.rank,
            "ranks_per_node": self._per_node,
        }


def topq_hook(state: TopQState, bucket: dist.GradBucket) -> Future[Tensor]:
    """Return a future of the bucket's average over the ranks, of which each sent its top-Q part.

    A DistributedDataParallel communication hook, for `model.register_comm_hook(state, topq_hook)`
    where `register_topq_hook` is too little. The result is written into the bucket's own buffer.

    Raises ExchangeError, on every rank, where ranks disagree on the settings or one has failed;
    DistributedDataParallel cannot go on after an error in backward(), so make the model anew.
    """
    return state.push(
        bucket.buffer(), bucket.parameters(), first=bucket.index() == 0, last=bucket.is_last()
    )


def register_topq_hook(
    ddp_model: DistributedDataParallel,
    optimizer: Optimizer | None = None,
    *,
    q: float | None = None,
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
    adapt_rate: bool = True,
) -> TopQState:
    """Make `ddp_model` exchange only the top-Q part of its gradients, and return the hook's state.

    Takes TopQState's knobs and raises what it raises, before anything is touched; a model takes
    one communication hook, once. A collective: call it on every rank.

    Give it the optimizer that steps the model, whose momentum it then takes out while it sends
    little: a momentum behind error feedback breaks training. Without one, set it by hand, for SGD
    momentum 0 and the rate divided by 1 - momentum, for Adam and its kind beta1 = 0.
    """
    state = TopQState(
        ddp_model,
        optimizer,
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
        adapt_rate=adapt_rate,
    )
    ddp_model.register_comm_hook(state, topq_hook)
    return state
