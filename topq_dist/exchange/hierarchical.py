"""Hierarchical exchange: dense inside a node, top-Q between the nodes."""

from __future__ import annotations

import datetime as dt

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.compress.aggregate import write_sum
from topq_dist.compress.codec.frame import Frame, FrameError, decode_frame
from topq_dist.compress.coherence import NO_COHERENCE, Coherence
from topq_dist.exchange.agreement import ExchangeError
from topq_dist.exchange.allgather import AllGather, Gathering
from topq_dist.exchange.base import Exchange, Job, Link, Pending

_FAILED = -1


class Hierarchical(Exchange):
    """Sum a node's gradients on its first rank, all-gather frames between these, hand them down.

    Nodes are runs of `per_node` consecutive ranks of the group; what is owed is owed by a node's
    first rank. Only what leaves a node is counted as sent.
    """

    tells = False

    def __init__(self, link: Link, per_node: int) -> None:
        ranks = dist.get_process_group_ranks(link.group)
        nodes = [ranks[first : first + per_node] for first in range(0, link.size, per_node)]
        node = nodes[link.rank // per_node]
        self._per_node = per_node
        self._nodes = len(nodes)
        self._leader = node[0]
        self._inside = _link_among(node, link)
        # every rank makes one with its like, though only the first ranks use theirs: torch names
        # groups by how many a process has, and the names of a group must be the same in all
        between = _link_among(ranks[link.rank % per_node :: per_node], link)
        self._between = AllGather(between) if link.rank % per_node == 0 else None

    def launch(self, job: Job) -> Pending:
        with self._inside.meter.timed("wait_s"):
            dist.reduce(job.bucket, self._leader, group=self._inside.group)
        gathering = None if self._between is None else self._between.launch(job)
        return _Handing(job, gathering, self._inside, self._leader, self._nodes, self._per_node)


class _Handing:
    def __init__(
        self,
        job: Job,
        gathering: Gathering | None,
        inside: Link,
        leader: int,
        nodes: int,
        per_node: int,
    ) -> None:
        self._job = job
        self._gathering = gathering
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
        if self._gathering is not None:
            try:
                finite = self._gathering.receive()
                lengths = torch.tensor([frame.numel() for frame in self._gathering.frames])
            except (ExchangeError, FrameError) as failed:
                error = failed
        lengths = self._hand_down(lengths)
        if error is not None:
            raise error
        if int(lengths[0]) == _FAILED:
            raise ExchangeError(f"the exchange failed on rank {self._leader}, which says why")
        if self._gathering is not None:
            self.coherence = self._gathering.coherence
            self._hand_down(torch.tensor(self.coherence, dtype=torch.float64))
            self._hand_down(torch.cat(self._gathering.frames))
            return finite
        self.coherence = Coherence(*self._hand_down(torch.empty(2, dtype=torch.float64)).tolist())
        payload = self._hand_down(torch.empty(int(lengths.sum()), dtype=torch.uint8))
        numel = self._job.bucket.numel()
        frames = torch.split(payload, lengths.tolist())
        self._frames = [decode_frame(frame, numel=numel) for frame in frames]
        return all(frame.finite for frame in self._frames)

    def _hand_down(self, message: Tensor) -> Tensor:
        with self._inside.meter.timed("wait_s"):
            on_device = message.to(self._inside.device)
            dist.broadcast(on_device, self._leader, group=self._inside.group)
            return on_device.cpu()

    def deliver(self) -> None:
        if self._gathering is not None:
            self._gathering.deliver()
        else:
            write_sum(self._frames, divisor=self._nodes, out=self._job.bucket)
        # the frames hold sums over a node, so that what is owed is in the same unit as without
        self._job.bucket.div_(self._per_node)


def _link_among(ranks: list[int], link: Link) -> Link:
    # called by its members alone, or a model that trains in a subgroup would wait for the others
    group: dist.ProcessGroup = dist.new_group(
        ranks,
        timeout=_timeout_of(link),
        backend=dist.get_backend(link.group),
        use_local_synchronization=True,
    )
    return Link(group=group, device=link.device, meter=link.meter)


def _timeout_of(link: Link) -> dt.timedelta | None:
    # private, and read leniently: torch's default is half an hour
    try:
        timeout: dt.timedelta = link.group._get_backend(link.device).options._timeout
    except (AttributeError, RuntimeError):
        return None
    return timeout
