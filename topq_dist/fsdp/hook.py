"""The hook for a model under fully_shard: frames between the replicas of each shard."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import Module
from torch.optim import Optimizer

from topq_dist.compress.defaults import (
    DEFAULT_BOUND,
    DEFAULT_Q,
    DEFAULT_VALUE_FORMAT,
    usual_bound,
    usual_value_format,
)
from topq_dist.compress.residual import merged
from topq_dist.compress.unsent import UnsentWatch
from topq_dist.dtypes import local_part
from topq_dist.exchange.agreement import gather_texts
from topq_dist.exchange.collectives import CommContext
from topq_dist.exchange.registry import check_exchange
from topq_dist.exchange.shards import check_same_on_all_shards, telling_of_failures
from topq_dist.exchange.whole import AllReduceWhole
from topq_dist.fsdp import checkpoint
from topq_dist.fsdp.capture import Capture, Reduction
from topq_dist.fsdp.checks import (
    check_knobs,
    check_meshes,
    check_model,
    check_parameters,
    check_replicate_group,
)
from topq_dist.fsdp.sharded import ShardedModules, shard_device, shard_group, sharded_names
from topq_dist.fsdp.shards import ShardFacts, ShardLayouts, ShardSparsity
from topq_dist.fsdp.torch_side import reduced_dtype
from topq_dist.hook.parts import (
    HookParts,
    KnobOptions,
    Knobs,
    WrappedModel,
    assemble,
    connect,
)
from topq_dist.telemetry.readings import Reading, rank_readings
from topq_dist.telemetry.stats import Meter, Stats
from topq_dist.validation import check_fraction, warn_caller


class ShardedTopQState:
    """State of the hook on a model under fully_shard, made by `register_topq_hook`.

    The gradients that fully_shard's reduce-scatters leave on a rank, its shards, are exchanged
    between the replicas once a backward pass is over: compressed with error feedback, each
    parameter's shard for itself. Knobs are those of `topq_dist.TopQState`; `scope="bucket"`,
    `exchange="hierarchical"` and a TopQGradientOptimizer are refused. With q = 0 and values as they
    are the exchange is an all-reduce, to the bits of fully_shard on a 2-D mesh (HSDP).

    A step in which a gradient of any rank is not finite is void: all gradients of all ranks are
    NaN, and no residual has changed. After an error in backward() the model and its hook are to be
    made anew.
    """

    def __init__(
        self,
        model: FSDPModule,
        optimizer: Optimizer | None,
        replicate_group: dist.ProcessGroup | None,
        options: KnobOptions,
    ) -> None:
        self._names = sharded_names(model)
        check_meshes(self._names)
        some = next(iter(self._names))
        shards = shard_group(some)
        replicas = check_replicate_group(replicate_group, shards)
        context = CommContext(
            group=replicas,
            device=shard_device(some),
            meter=Meter(),
            shards=shards,
        )
        # before anything that may fail on one rank alone
        places = _places(context)
        with telling_of_failures(context):
            _check_places(places)
            check_parameters(model, self._names)
            knobs = _knobs(options)
            check_knobs(knobs, optimizer)
            self._optimizer = optimizer
            self._asked_exchange = knobs.exchange
            self._modules = ShardedModules(model, self._names)
            self._facts = ShardFacts(self._names)
            self._layouts = ShardLayouts(self._names)
            self._parts = self._make_parts(knobs, optimizer)
        self._ranks = connect(self._parts, knobs, context)
        _warn_of_different_replicas(self._names, context)
        self._capture = Capture(model, self._modules, self._names, replicas.size(), self._exchange)

    def _make_parts(self, knobs: Knobs, optimizer: Optimizer | None) -> HookParts:
        per_node = check_exchange(knobs.exchange, knobs.ranks_per_node)
        q = DEFAULT_Q if knobs.q is None else knobs.q
        sparsity = ShardSparsity(q, knobs.scope, self._names, knobs.value_format)
        wrapped = WrappedModel(self._names, self._facts, sparsity, self._layouts)
        return assemble(knobs, wrapped, optimizer, per_node)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that steps the model."""
        return self._optimizer

    @property
    def q(self) -> float:
        """The q of every parameter; may be set between steps, on every rank alike."""
        return check_fraction("q", self._sparsity.q)

    @q.setter
    def q(self, value: float) -> None:
        self._sparsity.q = check_fraction("q", value)

    @property
    def _sparsity(self) -> ShardSparsity:
        sparsity = self._parts.stages.sparsity
        assert isinstance(sparsity, ShardSparsity)  # noqa: S101 - for mypy: made above
        return sparsity

    @property
    def chosen_exchange(self) -> str | None:
        """What exchange="auto" has chosen; None until it has, and where it was not asked to."""
        return self._ranks.exchange.chosen

    def detach(self) -> None:
        """Hand the optimizer its momentum back for good; a second call does nothing.

        The hook goes on as with momentum="optimizer".
        """
        self._parts.stages.momentum.detach()

    def stats(self) -> Stats:
        """Return this rank's totals so far; bytes are those between the replicas."""
        return self._ranks.context.meter.stats

    def observe(self) -> None:
        """Measure from the next step on what waits in the residuals; a second call does nothing."""
        pipeline = self._ranks.pipeline
        pipeline.watch = pipeline.watch or UnsentWatch()

    def readings(self) -> list[Reading]:
        """Return what this rank's metrics stand at now; from any thread."""
        watch = self._ranks.pipeline.watch
        unsent = None if watch is None else watch.reading
        return rank_readings(
            self._ranks.context.meter, unsent, self.chosen_exchange or self._asked_exchange
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank needs to resume: residuals by parameter name, q, momentum.

        Nested dicts of DTensors, sharded as the parameters are, and tensors, for torch's
        distributed checkpoint, which takes this state as it is: `dcp.save({"topq": state, ...})`.
        Every replica has its own under its number. A copy; zeros where nothing is kept.
        """
        return checkpoint.save(self._parts, self._ranks, self._kept())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned to as many replicas, of any number of shards.

        What `dcp.load({"topq": state, ...})` calls. A collective of all ranks. Raises ValueError or
        TypeError on a rank whose state does not fit, ExchangeError on the others, and changes
        nothing. Another number of replicas is taken by `load_checkpoint`.
        """
        with telling_of_failures(self._ranks.context):
            loaded = checkpoint.loaded_of_own(state, self._ranks)
            take_up = self._checked(loaded)
        check_same_on_all_shards("a state to load", self._ranks.context)
        take_up()

    def load_checkpoint(self, checkpoint_id: str | os.PathLike[str], key: str = "topq") -> None:
        """Resume from a distributed checkpoint in a folder, whatever the mesh that has saved it.

        key: the hook's state in what was saved, "topq" of `dcp.save({"topq": state, ...})`. With
        another number of replicas the residuals of those saved go to those there are now, so that
        their sum stays what it was. A collective of all ranks, those of other groups included.
        """
        context, folder = self._ranks.context, os.fspath(checkpoint_id)
        with telling_of_failures(context):
            empty = checkpoint.prepare(self._parts, self._ranks, self._kept(), folder, key)
        check_same_on_all_shards(f"{key!r} of {empty.replicas} replicas", context)
        loaded = checkpoint.read(empty, key)
        with telling_of_failures(context):
            take_up = self._checked(loaded)
        check_same_on_all_shards("a checkpoint to load", context)
        take_up()

    def _checked(self, loaded: checkpoint.Loaded) -> Callable[[], None]:
        """Return what takes up a state, a collective of the replicas.

        Raises TypeError or ValueError where it does not fit, having changed nothing.
        """
        stages, exchange, of = self._parts.stages, self._ranks.exchange, self._kept()
        shapes = {one.name: tuple(local_part(one.parameter).shape) for one in of}
        mine = [checkpoint.as_hook_state(held, loaded, of) for held in loaded.mine]
        every = [checkpoint.as_hook_state(held, loaded, of) for held in loaded.every]
        for one in (*mine, *every):
            stages.momentum.check_state(one, shapes)
            if one["residuals"] and not stages.compressor.error_feedback:
                raise ValueError("state has residuals: expected a hook with error_feedback=True")
        q = check_fraction("q", float(loaded.common["q"]))
        chosen = checkpoint.chosen_in(loaded)
        exchange.check_chosen(chosen)
        dense_steps = int(loaded.common["dense_steps"]) if loaded.is_own else 0

        def take_up() -> None:
            self.q = q
            exchange.resume(chosen, dense_steps)
            # of fewer replicas than there are now some take over nothing but what all had alike
            stages.momentum.load_states(mine, every or [checkpoint.as_hook_state({}, loaded, of)])
            residuals = merged([one["residuals"] for one in mine])
            stages.momentum.load_residuals(self._with_those_of_others(residuals))

        return take_up

    def _with_those_of_others(self, residuals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return residuals, and zeros for those that other replicas alone have; a collective.

        What is exchanged, and how, goes by which there are.
        """
        context = self._ranks.context
        mine = json.dumps(sorted(residuals))
        texts = gather_texts(mine, group=context.group, device=context.device)
        held = {name for text in texts for name in json.loads(text)}
        return {
            one.name: residuals[one.name] if one.name in residuals else one.zeros()
            for one in self._kept()
            if one.name in held
        }

    def _kept(self) -> list[checkpoint.Kept]:
        dtypes = {
            one: reduced_dtype(module, one) for module, held in self._modules.all() for one in held
        }
        return checkpoint.kept(self._parts, dtypes)

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange what a backward pass has left, and add the averages to the gradients."""
        reductions = self._capture.take()
        self._facts.note(reductions)
        with self._capture.stream():
            if self._reduces_whole():
                self._all_reduce(reductions)
            else:
                self._average(reductions)
        self._capture.wait()

    def _reduces_whole(self) -> bool:
        """Return whether the pass all-reduces gradients, and nothing else is done to them."""
        exchange, stages = self._ranks.exchange, self._parts.stages
        return (
            isinstance(exchange, AllReduceWhole)
            and exchange.all_reduces_next
            and stages.clip_norm is None
            and not self._holds_residuals()
        )

    def _holds_residuals(self) -> bool:
        held = self._parts.stages.compressor.residuals
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


def register(
    model: Module,
    optimizer: Optimizer | None = None,
    *,
    replicate_group: dist.ProcessGroup | None = None,
    **knobs: Unpack[KnobOptions],
) -> ShardedTopQState:
    """Make the replicas of a model under fully_shard exchange top-Q parts of their gradients.

    A collective of all ranks that train the model. See `topq_dist.register_topq_hook`.
    """
    return ShardedTopQState(check_model(model), optimizer, replicate_group, knobs)


def _knobs(options: KnobOptions) -> Knobs:
    """Return all knobs; raises TypeError or ValueError."""
    feedback = options.get("error_feedback", True)
    q = options.get("q")
    return Knobs(
        q=q,
        momentum=options.get("momentum"),
        error_feedback=feedback,
        value_format=usual_value_format(
            options.get("value_format", DEFAULT_VALUE_FORMAT), error_feedback=feedback, q=q
        ),
        bound=usual_bound(options.get("bound", DEFAULT_BOUND), error_feedback=feedback),
        exchange=options.get("exchange", "auto"),
        scope=options.get("scope", "parameter"),
        clip_norm=options.get("clip_norm"),
        grad_scaler=options.get("grad_scaler"),
        ranks_per_node=options.get("ranks_per_node"),
        mask_velocity=options.get("mask_velocity", True),
        adapt_rate=options.get("adapt_rate", True),
    )


def _add_to_gradient(parameter: Tensor, average: Tensor) -> None:
    if parameter.grad is not None:
        gradient = local_part(parameter.grad)
        gradient += average.to(gradient).view_as(gradient)


def _places(context: CommContext) -> list[str]:
    """Return the place that each shard of this replica has among its replicas; a collective."""
    assert context.shards is not None  # noqa: S101 - for mypy: made with them
    place = f"{context.rank} of {context.size}"
    return gather_texts(place, group=context.shards, device=context.device)


def _check_places(places: Sequence[str]) -> None:
    if len(set(places)) > 1:
        raise ValueError(
            f"replicate_group numbers this replica differently on its shards, {places}: expected "
            "the groups of one 2-D mesh"
        )


def _warn_of_different_replicas(names: Mapping[Tensor, str], context: CommContext) -> None:
    sums = [float(local_part(one.detach()).double().abs().sum()) for one in names]
    texts = gather_texts(str(sums), group=context.group, device=context.device)
    if len(set(texts)) > 1:
        warn_caller(
            "the replicas begin with different parameters, and would stay apart, since gradients "
            "are all that they exchange: load or broadcast the same ones on all of them"
        )
