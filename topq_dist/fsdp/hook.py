"""The hook for a model under fully_shard: frames between the replicas of each shard."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import Module
from torch.optim import Optimizer

from topq_dist.compress.defaults import DEFAULT_Q
from topq_dist.compress.residual import merged
from topq_dist.dtypes import local_part
from topq_dist.exchange.agreement import gather_texts
from topq_dist.exchange.collectives import CommContext
from topq_dist.exchange.registry import check_exchange
from topq_dist.exchange.shards import check_same_on_all_shards, telling_of_failures
from topq_dist.fsdp import checkpoint
from topq_dist.fsdp.capture import Capture
from topq_dist.fsdp.checks import (
    check_knobs,
    check_meshes,
    check_model,
    check_parameters,
    check_places,
    check_replicate_group,
    places_of_shards,
    warn_of_different_replicas,
)
from topq_dist.fsdp.pass_end import PassEnd
from topq_dist.fsdp.sharded import ShardedModules, shard_device, shard_group, sharded_names
from topq_dist.fsdp.shards import ShardFacts, ShardLayouts, ShardSparsity
from topq_dist.fsdp.torch_side import reduced_dtype
from topq_dist.hook.call_watch import CallWatch
from topq_dist.hook.parts import KnobOptions, Knobs, Ranks, WrappedModel, assemble, connect
from topq_dist.hook.state import HookState
from topq_dist.telemetry.stats import Meter
from topq_dist.validation import check_fraction


class ShardedTopQState(HookState):
    """State of the hook on a model under fully_shard, made by `register_topq_hook`.

    The gradients that fully_shard's reduce-scatters leave on a rank, its shards, are exchanged
    between the replicas once a backward pass is over: compressed with error feedback, each
    parameter's shard for itself. Knobs are those of `topq_dist.TopQState`; `scope="bucket"`,
    `exchange="hierarchical"` and a TopQGradientOptimizer are refused. With q = 0 and values as they
    are the exchange is an all-reduce, to the bits of fully_shard on a 2-D mesh (HSDP).
    Made with q = 0 and the default value_format, values stay as they are, whatever q is set to.

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
        names = sharded_names(model)
        check_meshes(names)
        some = next(iter(names))
        shards = shard_group(some)
        replicas = check_replicate_group(replicate_group, shards)
        context = CommContext(
            group=replicas, device=shard_device(some), meter=Meter(), shards=shards
        )
        # before anything that may fail on one rank alone
        places = places_of_shards(context)
        with telling_of_failures(context):
            check_places(places)
            check_parameters(model, names)
            knobs = Knobs(**options)
            knobs = knobs.usual(q=knobs.q)
            check_knobs(knobs, optimizer)
            super().__init__(knobs, optimizer, context.meter)
            self._modules = ShardedModules(model, names)
            facts, layouts = ShardFacts(names), ShardLayouts(names)
            per_node = check_exchange(knobs.exchange, knobs.ranks_per_node)
            q = DEFAULT_Q if knobs.q is None else knobs.q
            self._sparsity = ShardSparsity(q, knobs.scope, names, knobs.value_format)
            half = frozenset(
                names[one] for one, dtype in self._dtypes().items() if dtype == torch.float16
            )
            wrapped = WrappedModel(names, facts, self._sparsity, layouts, half)
            self._parts = assemble(knobs, wrapped, optimizer, per_node)
        self._ranks: Ranks = connect(self._parts, knobs, context)
        warn_of_different_replicas(names, context)
        self._calls = CallWatch(optimizer)
        at_end = PassEnd(self._modules, facts, layouts, self._parts, self._ranks, self._calls)
        Capture(model, self._modules, names, replicas.size(), at_end.exchange)

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

    def observe(self) -> None:
        """Measure from the next step on what waits in the residuals; a second call does nothing."""
        super().observe()
        self._ranks.pipeline.watch = self._watch

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
            known = every or [checkpoint.as_hook_state({}, loaded, of)]
            stages.momentum.load_states(mine, known, known[0])
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
        return checkpoint.kept(self._parts, self._dtypes())

    def _dtypes(self) -> dict[Tensor, torch.dtype]:
        """Return those in which gradients are reduced."""
        return {
            one: reduced_dtype(module, one) for module, held in self._modules.all() for one in held
        }


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
