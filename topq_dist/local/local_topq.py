"""Local steps: inner steps on each rank, and every so often a compressed average of the changes.

Sources: Douillard et al., "DiLoCo" (2023) and "Streaming DiLoCo" (arXiv 2501.18512); SparseLoCo
(arXiv 2508.15706), whose compression with a decaying residual this is, by an exact top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.defaults import DEFAULT_VALUE_FORMAT, usual_value_format
from topq_dist.compress.unsent import UnsentWatch
from topq_dist.elastic.group import WatchedGroup
from topq_dist.elastic.membership import Membership
from topq_dist.elastic.settings import Elastic, check_elastic
from topq_dist.exchange.collectives import CommContext
from topq_dist.exchange.epochs import Epochs, LostResidual, check_saves_own
from topq_dist.exchange.gathered_states import gather_states
from topq_dist.exchange.registry import check_exchange, check_ranks, make_exchange
from topq_dist.exchange.shards import check_same_on_all_shards, telling_of_failures
from topq_dist.local.buffers import BufferRounds
from topq_dist.local.first_rank import give_all, nbytes_of
from topq_dist.local.left_out import LeftOut
from topq_dist.local.model import device_of, local_model
from topq_dist.local.node import averaging_group, check_group, group_alone, node_group
from topq_dist.local.peer_state import check_can_be_elastic, handed_from, take_handed
from topq_dist.local.replica import Replica
from topq_dist.local.rounds import Rounds
from topq_dist.local.saved_state import STATE_VERSION, SavedState, load, load_from_peer, save
from topq_dist.local.settings import (
    BufferRule,
    LocalExchangeName,
    check_local_exchange,
    make_settings,
)
from topq_dist.telemetry.readings import Reading, joined, rank_readings
from topq_dist.telemetry.stats import Meter, Stats
from topq_dist.validation import check_fraction


class LocalTopQ:
    """Steps `optimizer` on each rank alone, and exchanges what `every` steps have changed.

    `step()` takes the place of `optimizer.step()`. After `every` inner steps the change of each
    parameter, with what earlier rounds have left of it, is compressed; what was sent is averaged
    over the ranks, and the outer optimizer steps the outer parameters along it, with which every
    rank goes on.

    model: any module, also one wrapped in DistributedDataParallel (among the ranks of a node, with
        `process_group` the ranks across nodes) or sharded by fully_shard (each rank exchanges its
        shard with those that hold the same one). What is trainable now is exchanged.
    optimizer: of this model. Its state, and its momentum, are each rank's own.
    every: inner steps from one round of a parameter to its next.
    q: fraction of each parameter's change that is not sent, a number in [0, 1]; may be set anew
        between rounds, on every rank alike. Policies for q are the hook's and the server's alone.
    value_format: how what is sent travels: "fp32", "fp16", "bf16", "int8", "int4", "int2", "fp64",
        "ec2", "ec1", "ecfp16", "ecbf16"; None is lossless, and the default where q is 0. Decided
        once: made with q=0, values travel in full whatever q is set to later, unless it is given.
    residual_decay: what a residual is multiplied by in each round, in [0, 1].
    bound: clip what is sent to so many times the mean magnitude of what is sent of the same
        parameter, and keep what is clipped; None does not.
    outer_lr, outer_momentum, nesterov: of the outer optimizer, SGD. With rate 1 and no momentum,
        and q=0, a round is the mean of the ranks' parameters, to the bit.
    fragments: into how many runs of parameters the model is divided, each exchanged at its own step
        within `every`: the n-th of F at ceil(n * every / F), or where `offsets` says, from 1 to
        `every`. A parameter's rounds depend on these steps alone: with offsets that are equal (with
        every=1 all are) any number of fragments ends in the same bits.
    overlap: inner steps that are taken beside the exchange of a round, below `every`.
    blend: how much of themselves parameters then keep: blend * parameters + (1 - blend) * outer
        parameters (Streaming DiLoCo's alpha), in [0, 1). None keeps what the steps beside the
        exchange have changed, all of it, on top of the outer parameters.
    buffers: "first": every `every` steps the others take the first rank's buffers, as with
        DistributedDataParallel at each step; "own": each rank keeps its own.
    exchange: "allgather" sends every frame to every rank, "split" reduces each part of the index
        space on one rank, for many; "hierarchical" sums inside a node, of `ranks_per_node` ranks,
        and sends one frame a node.
    process_group: the ranks that average; None is the default group.
    elastic: go on where ranks are lost, and take in those that come back: an Elastic, or True for
        what MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE say. The group is then one of its own, so
        there is no process_group; the model is bare, whole on each rank. A process that comes in
        goes on at `steps_taken` with parameters, buffers and optimizers' state of a rank that is in
        the run; `close` leaves it.

    Making one is a collective of the group, and of the ranks that train one copy of the model
    together, after which every rank has the first one's parameters, frozen ones too, and buffers.
    Raises TypeError or ValueError on bad input, and ExchangeError on every rank where ranks
    disagree on settings or model; nothing is touched before that. An elastic one raises
    RefusedError in a process that the run does not take in.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int,
        q: float,
        value_format: str | None = DEFAULT_VALUE_FORMAT,
        residual_decay: float = 0.95,
        bound: float | None = None,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        nesterov: bool = False,
        fragments: int = 1,
        offsets: Sequence[int] | None = None,
        overlap: int = 0,
        blend: float | None = None,
        buffers: BufferRule = "first",
        exchange: LocalExchangeName = "allgather",
        ranks_per_node: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        elastic: bool | Elastic = False,
    ) -> None:
        place = check_elastic(elastic)
        group = averaging_group(process_group) if place is None else group_alone(process_group)
        self._context = CommContext(
            group=group,
            device=device_of(model),
            meter=Meter(),
            shards=None if place is not None else node_group(model, group),
        )
        with telling_of_failures(self._context):
            self._settings = make_settings(
                every=every,
                outer_lr=outer_lr,
                outer_momentum=outer_momentum,
                nesterov=nesterov,
                fragments=fragments,
                offsets=offsets,
                overlap=overlap,
                blend=blend,
                buffers=buffers,
            )
            compressor = TopKCompressor(
                value_format=usual_value_format(value_format, error_feedback=True, q=q),
                error_feedback=True,
                bound=bound,
                residual_decay=residual_decay,
            )
            check_local_exchange(exchange)
            self._asked_exchange = exchange
            self._per_node = check_exchange(exchange, ranks_per_node)
            self._model = local_model(model, optimizer)
            if place is None:
                check_group(model, group)
            check_ranks(self._per_node, group.size() if place is None else place.ranks)
            if place is not None:
                check_can_be_elastic(model, self._model, optimizer)
            self._replica = Replica(self._model.parameters, self._settings, compressor, q=q)
        asked = f"q={q} exchange={exchange} ranks_per_node={self._per_node}"
        texts = [asked, self._settings.text(), compressor.settings(), self._model.text()]
        settings = "\n".join(texts)
        self.optimizer = optimizer
        self._exchange_among = partial(
            make_exchange, exchange, compressor=compressor, per_node=self._per_node
        )
        self._elastic: Epochs | None = None
        if place is not None:
            membership = Membership(place, settings=settings, per_node=self._per_node)
            self._elastic = Epochs(membership, self, self._context, settings)
        commit = None if self._elastic is None else self._elastic.commit
        alike = self._model.text_of_buffers if buffers == "first" else str
        self._rounds = Rounds(self._replica, self._settings, commit, alike=alike)
        self._step = 0
        self._buffers = BufferRounds(self._model, self._settings, commit)
        self._resumed: dict[int, tuple[int, Tensor]] = {}
        self._left_out = LeftOut(self._model, optimizer)
        self._dense_bytes = nbytes_of(self._model.parameters.values())
        self._skip_until = 0
        if self._elastic is not None:
            self._elastic.begin()
            if isinstance(group, WatchedGroup):
                # it was this process's alone
                group.leave()
            return
        check_same_on_all_shards(
            settings, self._context, of_shard=f"\n{self._model.text_of_shard()}"
        )
        # as DDP's own at its start, this is in no account
        give_all(self._model.tensors().values(), replace(self._context, meter=Meter()))
        for fragment in self._replica.fragments:
            fragment.outer = fragment.gather()
        self.enter(self._context)

    @property
    def q(self) -> float:
        """The fraction of each parameter's change that is not sent."""
        return self._replica.q

    @q.setter
    def q(self, value: float) -> None:
        self._replica.q = check_fraction("q", value)

    @property
    def void_rounds(self) -> int:
        """How many rounds were void, a change not being finite on some rank."""
        return self._rounds.void

    @property
    def steps_taken(self) -> int:
        """Inner steps that have been taken; in a process that has come in, by its peers."""
        return self._step

    @property
    def members(self) -> tuple[str, ...]:
        """Names of those in an elastic run now, by rank."""
        return () if self._elastic is None else self._elastic.names

    @property
    def rank(self) -> int:
        """This process's place among those that exchange now."""
        return self._context.rank

    @property
    def lost_residuals(self) -> tuple[LostResidual, ...]:
        """Ranks that an elastic run has lost so far, with what they had not sent."""
        return () if self._elastic is None else tuple(self._elastic.lost)

    def stats(self) -> Stats:
        """Return this rank's totals so far; a step is an inner one, dense bytes are DDP's."""
        return self._context.meter.stats

    def observe(self) -> None:
        """Measure from the next round on what waits in the residuals; a second call does nothing.

        Ages are in rounds of a parameter, and void rounds count as void steps.
        """
        watches = tuple(UnsentWatch(every=1) for _ in self._replica.fragments)
        self._rounds.watches = self._rounds.watches or watches

    def readings(self) -> list[Reading]:
        """Return what this rank's metrics stand at now; from any thread."""
        watches = self._rounds.watches
        unsent = joined(watch.reading for watch in watches) if watches else None
        return rank_readings(self._context.meter, unsent, self._asked_exchange)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step the optimizer, and begin and receive the rounds that are due; return its loss.

        Raises ExchangeError, on every rank, where ranks disagree or one has failed.
        """
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self.end_step()
        return loss

    @torch.no_grad()
    def end_step(self) -> None:
        """Do what `step` does once the optimizer has stepped, for who steps it otherwise.

        GradScaler does, and trainers do. On every rank, once for each inner step.
        """
        self._step += 1
        if self._elastic is None:
            self._exchange()
        else:
            self._elastic.run(self._exchange)
        self._context.meter.add(steps=1, dense_bytes=self._dense_bytes)

    @torch.no_grad()
    def synchronize(self) -> None:
        """Exchange what inner steps have changed and make all ranks equal; a collective.

        For the end of training, or an evaluation in between: of what is under way, and of a period
        that is not over, no rank's model has all. Afterwards parameters are the outer ones, and
        buffers the first rank's unless each keeps its own.

        Raises RuntimeError, on every rank, where a change is not finite on some rank, and what
        `step` raises.
        """
        if self._elastic is None:
            self._synchronize()
            return
        while not self._elastic.run(self._synchronize):
            pass

    def _exchange(self) -> None:
        if self._step <= self._skip_until:
            return
        if self._rounds.due(self._step):
            self._left_out.warn()
        self._begin_resumed(self._step - 1)
        self._rounds.end_step(self._step)
        self._buffers.end_step(self._step)

    def _synchronize(self) -> None:
        self._begin_resumed(self._step)
        self._rounds.receive_all()
        void = self._rounds.void
        for fragment in range(len(self._replica.fragments)):
            self._rounds.begin(self._replica.begin(fragment), self._step, self._step)
        self._rounds.receive_all()
        if self._rounds.void > void:
            raise RuntimeError(
                "ranks cannot be made equal while a change of parameters is not finite on some "
                "rank: every rank keeps its own, and nothing is lost"
            )
        for one in self._replica.fragments:
            one.take_up(None)
        self._buffers.synchronize(self._step)

    def _begin_resumed(self, step: int) -> None:
        """Send once more what a saved run had under way, at the first step after it."""
        resumed, self._resumed = self._resumed, {}
        for fragment, (received_at, launched) in resumed.items():
            self._rounds.begin(self._replica.begin(fragment, launched), step, received_at)
        self._buffers.begin_resumed()

    def state_dict(self, *, all_ranks: bool = False) -> dict[str, Any]:
        """Return what this rank needs to resume: parameters, outer ones, residuals, outer momentum,
        rounds under way, q, steps and totals.

        Tensors, numbers and strings only, so that torch.load(weights_only=True) reads it back.
        The model's buffers and the optimizer's state are saved beside it. Each rank's is its own:
        save one a rank, or, with all_ranks=True, what this returns on the group's first rank, which
        any number of ranks load. That is a collective; the others get an empty dict.
        """
        state = save(
            self._replica,
            self._identity(),
            step=self._step,
            void_rounds=self._rounds.void,
            stats=self._context.meter.stats,
            under_way={**self._resumed, **self._rounds.launched()},
            buffers=self._buffers.under_way(),
        )
        if self._elastic is not None:
            check_saves_own(all_ranks=all_ranks)
            state["lost_residuals"] = [one._asdict() for one in self._elastic.lost]
        if not all_ranks:
            return state
        return gather_states(state, self._context, version=STATE_VERSION)

    @torch.no_grad()
    def load_state_dict(self, state: SavedState) -> None:
        """Resume, parameters included, from what `state_dict` returned, on every rank alike.

        It is this rank's own, or those of all ranks: what `state_dict(all_ranks=True)` has
        returned, or a sequence of every rank's in rank order. Where the number of ranks has
        changed, the sum of the residuals stays what it was, and all ranks begin with the outer
        parameters and the mean of what inner steps have changed since the last rounds.

        Raises ValueError or TypeError, and changes nothing, for what is no such state, is another
        model's, or for a single one of another rank or world size.
        """
        if self._elastic is not None:
            self._elastic.check_may_load(self._step)
        buffers_bytes = nbytes_of(self._model.buffers().values())
        loaded = load(state, self._replica, self._identity(), buffers_bytes=buffers_bytes)
        self._rounds.drop()
        self._step, self._rounds.void = loaded.step, loaded.void_rounds
        self._context.meter.stats = loaded.stats
        self._resumed = loaded.under_way
        self._buffers.resume(loaded.buffers)

    def close(self) -> None:
        """Leave an elastic run, for good: the others go on without this rank at once."""
        if self._elastic is not None:
            self._elastic.close()

    def enter(self, context: CommContext) -> None:
        """Exchange in this context from now on, and forget what is under way; a collective."""
        self._rounds.enter(context, self._exchange_among(context))
        self._context = context
        self._buffers.enter(context)
        self._resumed = {}

    def skip_exchanges_until(self, step: int) -> None:
        """Begin no exchange up to this inner step, at which a peer is that has none under way."""
        self._skip_until = step

    def state_for_peer(self) -> dict[str, Any]:
        """Return what a rank takes that comes into an elastic run; tensors are not copied."""
        return {"rounds": self.state_dict(), **handed_from(self._model, self.optimizer)}

    @torch.no_grad()
    def take_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state_for_peer` has returned on a rank that is in the run."""
        loaded = load_from_peer(state["rounds"], self._replica)
        take_handed(state, self._model, self.optimizer)
        self._step, self._rounds.void = loaded.step, loaded.void_rounds

    def _identity(self) -> dict[str, int]:
        return {
            "world_size": self._context.size,
            "rank": self._context.rank,
            "ranks_per_node": self._per_node,
        }
