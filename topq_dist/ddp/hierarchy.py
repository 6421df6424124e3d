"""Hierarchical exchange: dense inside a node, top-Q between the nodes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.compress.compressor import average, is_finite
from topq_dist.ddp.exchange import AllGather, Gathering, Job, Link, Pending
from topq_dist.ddp.messages import ExchangeError, SettingsDifferError

_FAILED, _DIFFER = -1, -2

_FAILED = -1


class Hierarchical:
    """Sum a node's gradients on its first rank, all-gather frames between these, hand them down.

    Nodes are runs of `per_node` consecutive ranks of the group. Only what leaves a node is
    counted as sent.
    """

    def __init__(self, link: Link, per_node: int) -> None:
        ranks = dist.get_process_group_ranks(link.group)
        nodes = [ranks[first : first + per_node] for first in range(0, link.size, per_node)]
        node = nodes[link.rank // per_node]
        self._per_node = per_node
        self._nodes = len(nodes)
        self._leader = node[0]
        self._device = link.device
        self._inner = _new_group(node)
        self._between: AllGather | None = None
        if link.rank % per_node == 0:
            leaders = _new_group([ranks[0] for ranks in nodes])
            self._between = AllGather(Link(group=leaders, device=link.device, meter=link.meter))

    def launch(self, job: Job) -> Pending:
        dist.reduce(job.bucket, self._leader, group=self._inner)
        gathering = None
        if self._between is not None:
            job.bucket.div_(self._per_node)
            gathering = self._between.launch(job)
        return _Handing(job, gathering, self._leader, self._inner, self._nodes, self._device)


class _Handing:
    def __init__(
        self,
        job: Job,
        gathering: Gathering | None,
        leader: int,
        inner: dist.ProcessGroup,
        nodes: int,
        device: torch.device,
    ) -> None:
        self._job = job
        self._gathering = gathering
        self._leader = leader
        self._inner = inner
        self._nodes = nodes
        self._device = device
        self._frames: list[Tensor] = []

    def advance(self) -> None:
        pass

    def receive(self) -> bool:
        error: ExchangeError | None = None
        lengths = torch.full((self._nodes,), _FAILED)
        if self._gathering is not None:
            try:
                self._gathering.receive()
                self._frames = self._gathering.frames
                lengths = torch.tensor([frame.numel() for frame in self._frames])
            except SettingsDifferError as differ:
                error = differ
                lengths.fill_(_DIFFER)
            except ExchangeError as failed:
                error = failed
        lengths = self._hand_down(lengths)
        if error is not None:
            raise error
        if int(lengths[0]) == _DIFFER:
            raise SettingsDifferError("nodes have different settings")
        if int(lengths[0]) == _FAILED:
            raise ExchangeError(f"the exchange failed on rank {self._leader}, which says why")
        payload = torch.empty(int(lengths.sum()), dtype=torch.uint8)
        if self._gathering is not None:
            payload = torch.cat(self._frames)
        self._frames = list(torch.split(self._hand_down(payload), lengths.tolist()))
        return all(is_finite(frame) for frame in self._frames)

    def _hand_down(self, message: Tensor) -> Tensor:
        on_device = message.to(self._device)
        dist.broadcast(on_device, self._leader, group=self._inner)
        return on_device.cpu()

    def deliver(self) -> None:
        if self._gathering is not None:
            self._gathering.deliver()
        else:
            average(self._frames, out=self._job.bucket)


def _new_group(ranks: list[int]) -> dist.ProcessGroup:
    # called by its members alone, or a model that trains in a subgroup would wait for the others
    group: dist.ProcessGroup = dist.new_group(ranks, use_local_synchronization=True)
    return group
