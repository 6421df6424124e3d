"""Hierarchical exchange: dense inside a node, top-Q between the nodes."""

from __future__ import annotations

import datetime as dt

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.compress.aggregate import sum_exceeds, write_sum
from topq_dist.compress.codec.frame import Frame, FrameError, decode_frame
from topq_dist.compress.coherence import NO_COHERENCE, Coherence
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.elastic.group import WatchedGroup
from topq_dist.exchange.agreement import ExchangeError
from topq_dist.exchange.allgather import AllGather, AllGatherWork
from topq_dist.exchange.base import Exchange, ExchangeWork, Outgoing
from topq_dist.exchange.collectives import CommContext

_FAILED = -1


class Hierarchical(Exchange):
    """Sum a node's gradients on its first rank, all-gather frames between these, hand them down.

    Nodes are runs of `per_node` consecutive ranks of the group; a node's residual is its first
    rank's. Only what leaves a node is counted as sent.
    """

    carries_settings = False

    def __init__(self, context: CommContext, compressor: TopKCompressor, per_node: int) -> None:
        self.compressor = compressor
        ranks = dist.get_process_group_ranks(context.group)
        nodes = [ranks[first : first + per_node] for first in range(0, context.size, per_node)]
        node = nodes[context.rank // per_node]
        self._per_node = per_node
        self._nodes = len(nodes)
        self._leader = node[0]
        self._inside = _context_among(node, context)
        # every rank makes one with its like, though only the first ranks use theirs: torch names
        # groups by how many a process has, and the names of a group must be the same in all
        between = _context_among(ranks[context.rank % per_node :: per_node], context)
        leads = context.rank % per_node == 0
        self._between = AllGather(between, compressor) if leads else None
        self.frames_per_bucket = 1 if leads else 0

    def prepare(self, bucket: Tensor) -> None:
        with self._inside.meter.timed("wait_s"):
            dist.reduce(bucket, self._leader, group=self._inside.group)

    def launch(self, outgoing: Outgoing) -> ExchangeWork:
        gather = None if self._between is None else self._between.launch(outgoing)
        return HierarchicalWork(
            outgoing.bucket, gather, self._inside, self._leader, self._nodes, self._per_node
        )


class HierarchicalWork:
    """A bucket on its way between the nodes, and then to the other ranks of this one."""

    def __init__(
        self,
        bucket: Tensor,
        gather: AllGatherWork | None,
        inside: CommContext,
        leader: int,
        nodes: int,
        per_node: int,
    ) -> None:
        self._bucket = bucket
        self._gather = gather
        self._inside = inside
        self._leader = leader
        self._nodes = nodes
        self._per_node = per_node
        self._frames: list[Frame] = []
        self.coherence = NO_COHERENCE

    def advance(self) -> None:
        pass

    def receive(self) -> bool:
        error: ExchangeError | FrameError | None = None
        lengths = torch.full((self._nodes,), _FAILED)
        finite = True
        if self._gather is not None:
            try:
                finite = self._gather.receive()
                lengths = torch.tensor([frame.numel() for frame in self._gather.frames])
            except (ExchangeError, FrameError) as failed:
                error = failed
        lengths = self._hand_down(lengths)
        if error is not None:
            raise error
        if int(lengths[0]) == _FAILED:
            raise ExchangeError(f"the exchange failed on rank {self._leader}, which says why")
        if self._gather is not None:
            self.coherence = self._gather.coherence
            self._hand_down(torch.tensor(self.coherence, dtype=torch.float64))
            self._hand_down(torch.cat(self._gather.frames))
            return finite
        self.coherence = Coherence(*self._hand_down(torch.empty(2, dtype=torch.float64)).tolist())
        payload = self._hand_down(torch.empty(int(lengths.sum()), dtype=torch.uint8))
        numel = self._bucket.numel()
        frames = torch.split(payload, lengths.tolist())
        self._frames = [decode_frame(frame, numel=numel) for frame in frames]
        return all(frame.finite for frame in self._frames)

    def _hand_down(self, message: Tensor) -> Tensor:
        with self._inside.meter.timed("wait_s"):
            on_device = message.to(self._inside.device)
            dist.broadcast(on_device, self._leader, group=self._inside.group)
            return on_device.cpu()

    def exceeds(self, limit: float) -> bool:
        # of sums over a node
        limit *= self._per_node
        if self._gather is not None:
            return self._gather.exceeds(limit)
        return sum_exceeds(self._frames, divisor=self._nodes, limit=limit)

    def deliver(self) -> None:
        # the frames hold sums over a node, so that residuals are in the same unit as without; one
        # may be too large for float16 where the average is not
        at_once = self._per_node if self._bucket.dtype == torch.float16 else 1
        if self._gather is not None:
            self._gather.deliver(per_frame=at_once)
        else:
            write_sum(self._frames, divisor=self._nodes * at_once, out=self._bucket)
        if at_once == 1:
            self._bucket.div_(self._per_node)


def _context_among(ranks: list[int], context: CommContext) -> CommContext:
    group: dist.ProcessGroup
    if isinstance(context.group, WatchedGroup):
        group = context.group.among(ranks)
    else:
        # called by its members alone, or a model trained in a subgroup would wait for the others
        group = dist.new_group(
            ranks,
            timeout=_timeout_of(context),
            backend=dist.get_backend(context.group),
            use_local_synchronization=True,
        )
    return CommContext(group=group, device=context.device, meter=context.meter)


def _timeout_of(context: CommContext) -> dt.timedelta | None:
    # private, and read leniently: torch's default is half an hour
    try:
        timeout: dt.timedelta = context.group._get_backend(context.device).options._timeout
    except (AttributeError, RuntimeError):
        return None
    return timeout
