"""Collectives that carry frames of different lengths: one to all ranks, or one to each.

A frame that does not fit its slot (the first one never does) says so, and all ranks, having read
the same heads, go on to a second collective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.compress.coherence import NO_COHERENCE, Coherence, total
from topq_dist.exchange.slots import (
    Head,
    ReusableBuffer,
    Slot,
    check_heads,
    frame_in,
    pack,
    unpack,
)
from topq_dist.telemetry import Meter

# room costs bytes in every step, a tail a round trip where a frame has grown by more than this
_SPARE = 0.05
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class CommContext:
    """The ranks that frames travel among, and where what that costs is added up.

    shards: where each rank of the group holds one shard of a model, or trains one copy of it with
        others, these; they exchange no frames, and decide alike.
    """

    group: dist.ProcessGroup
    device: torch.device
    meter: Meter
    shards: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return self.group.rank()


def member(work: dist.Work | None) -> dist.Work:
    """Return `work`, which torch leaves out for a process outside the group."""
    if work is None:
        raise RuntimeError("this process is no member of the process group it trains in")
    return work


class _FrameCollective(ABC):
    """Frames on their way, launched when this is made.

    A frame of None says that this rank has failed, and lets the others know instead of leaving them
    to wait.

    coherence: this rank's; once received, the sum of all ranks'.
    """

    def __init__(self, context: CommContext, *, settings_digest: int, coherence: Coherence) -> None:
        self.coherence = coherence
        self._context = context
        self._settings_digest = settings_digest

    def frames(self) -> list[Tensor]:
        """Wait; return each rank's frame for this one, in rank order, 1-D uint8 tensors on the CPU.

        They are valid until the next collective with the same lanes. Raises ExchangeError, on every
        rank, where a rank failed or has other settings.
        """
        with self._context.meter.timed("wait_s"):
            heads = self._heads()
            check_heads(heads)
            frames = self._frames_of(heads)
        self.coherence = total(head.coherence for head in heads)
        return frames

    @abstractmethod
    def _heads(self) -> list[Head]:
        """Wait for the slots; return their heads in rank order, this rank's among them."""

    @abstractmethod
    def _frames_of(self, heads: Sequence[Head]) -> list[Tensor]:
        """Return the frames, after a second collective where one did not fit."""


@dataclass(frozen=True, kw_only=True)
class AllGatherLane:
    """What one bucket keeps between steps for its all-gather."""

    slot: Slot = field(default_factory=Slot)
    sent: ReusableBuffer = field(default_factory=ReusableBuffer)
    received: ReusableBuffer = field(default_factory=ReusableBuffer)


class FrameAllGather(_FrameCollective):
    """One frame of each rank on its way to all of them."""

    def __init__(
        self,
        frame: Tensor | None,
        lane: AllGatherLane,
        context: CommContext,
        *,
        settings_digest: int,
        coherence: Coherence = NO_COHERENCE,
    ) -> None:
        super().__init__(context, settings_digest=settings_digest, coherence=coherence)
        self._frame = frame
        self._lane = lane
        self._sent, self._received, self._work = self._gather()

    def _gather(self) -> tuple[Tensor, Tensor, dist.Work]:
        lane, context = self._lane, self._context
        sent = lane.sent.take(lane.slot.bytes, _CPU)
        pack(sent, self._frame, self._settings_digest, coherence=self.coherence)
        received = lane.received.take(context.size * sent.numel(), context.device)
        received = received.view(context.size, -1)
        work = dist.all_gather(
            list(received.unbind()), sent.to(context.device), group=context.group, async_op=True
        )
        context.meter.add(sent_bytes=sent.numel(), wire_bytes=sent.numel() * (context.size - 1))
        return sent, received, member(work)

    def _heads(self) -> list[Head]:
        self._work.wait()
        self._lane.sent.release(self._sent)
        self._lane.received.release(self._received)
        self._received = self._received.cpu()
        return [unpack(row) for row in self._received]

    def _frames_of(self, heads: Sequence[Head]) -> list[Tensor]:
        longest = max(head.frame_bytes for head in heads)
        fits = self._lane.slot.holds(longest)
        self._lane.slot.fit(longest)
        if not fits:
            self._sent, self._received, self._work = self._gather()
            heads = self._heads()
        return [frame_in(row, head) for row, head in zip(self._received, heads, strict=True)]


@dataclass(frozen=True, kw_only=True)
class AllToAllLanes:
    """What one bucket keeps between steps: a slot to and from each rank, and the buffers."""

    outgoing: list[Slot]
    incoming: list[Slot]
    sent: ReusableBuffer = field(default_factory=ReusableBuffer)
    received: ReusableBuffer = field(default_factory=ReusableBuffer)

    @classmethod
    def among(cls, size: int) -> AllToAllLanes:
        """Return the lanes of a rank among `size`, with room for heads alone."""
        return cls(
            outgoing=[Slot(_SPARE) for _ in range(size)],
            incoming=[Slot(_SPARE) for _ in range(size)],
        )


class FrameAllToAll(_FrameCollective):
    """A frame of each rank to each other on their way, in rank order.

    Every pair of ranks has a slot, sized from what both know: its frames of the last steps. What
    does not fit is the frame's tail. Each head says whether its sender has a tail for anybody, so
    all ranks know alike whether a second collective carries the tails, and that one has exactly
    their lengths. What a rank has for itself stays where it is.
    """

    def __init__(
        self,
        frames: Sequence[Tensor] | None,
        lanes: AllToAllLanes,
        context: CommContext,
        *,
        settings_digest: int,
        coherence: Coherence = NO_COHERENCE,
    ) -> None:
        super().__init__(context, settings_digest=settings_digest, coherence=coherence)
        self._mine = frames
        self._lanes = lanes
        self._others = [peer for peer in range(context.size) if peer != context.rank]
        tailed = frames is not None and any(
            not lanes.outgoing[peer].holds(frames[peer].numel()) for peer in self._others
        )
        # of which only what it says of this rank counts
        self._head = Head(0, settings_digest, frames is None, tailed, coherence)
        self._sizes = {peer: lanes.incoming[peer].bytes for peer in self._others}
        self._rows: dict[int, Tensor] = {}
        sizes = {peer: lanes.outgoing[peer].bytes for peer in self._others}
        self._sent = lanes.sent.take(sum(sizes.values()), _CPU)
        for peer, row in _split(self._sent, sizes).items():
            frame = None if frames is None else frames[peer]
            pack(row, frame, settings_digest, coherence=coherence, tailed=tailed)
        self._received = lanes.received.take(sum(self._sizes.values()), context.device)
        self._work = self._exchange(self._sent, sizes, self._received, self._sizes)

    def _exchange(
        self,
        sent: Tensor,
        sizes: Mapping[int, int],
        received: Tensor,
        received_sizes: Mapping[int, int],
    ) -> dist.Work:
        peers = range(self._context.size)
        self._context.meter.add(sent_bytes=sent.numel(), wire_bytes=sent.numel())
        return member(
            dist.all_to_all_single(
                received,
                sent.to(self._context.device),
                [received_sizes.get(peer, 0) for peer in peers],
                [sizes.get(peer, 0) for peer in peers],
                group=self._context.group,
                async_op=True,
            )
        )

    def _heads(self) -> list[Head]:
        self._work.wait()
        self._rows = _split(self._received.cpu(), self._sizes)
        heads = {peer: unpack(row) for peer, row in self._rows.items()}
        # every rank has written to every rank, so all of them raise for these or none
        return [heads.get(peer, self._head) for peer in range(self._context.size)]

    def _frames_of(self, heads: Sequence[Head]) -> list[Tensor]:
        mine, lanes = self._mine, self._lanes
        if mine is None:
            raise RuntimeError("a rank that has failed heard of it from no one")
        frames = {peer: frame_in(row, heads[peer]) for peer, row in self._rows.items()}
        if any(head.tailed for head in heads):
            for peer, tail in self._tails(mine, heads).items():
                frames[peer] = torch.cat([frames[peer], tail])
        for peer in self._others:
            lanes.outgoing[peer].fit(mine[peer].numel())
            lanes.incoming[peer].fit(heads[peer].frame_bytes)
        lanes.sent.release(self._sent)
        lanes.received.release(self._received)
        return [frames.get(peer, mine[peer]) for peer in range(self._context.size)]

    def _tails(self, mine: Sequence[Tensor], heads: Sequence[Head]) -> dict[int, Tensor]:
        outgoing, incoming = self._lanes.outgoing, self._lanes.incoming
        tails = {peer: mine[peer][outgoing[peer].room_bytes :] for peer in self._others}
        sizes = {peer: tail.numel() for peer, tail in tails.items()}
        back = {
            peer: max(0, heads[peer].frame_bytes - incoming[peer].room_bytes)
            for peer in self._others
        }
        received = torch.empty(sum(back.values()), dtype=torch.uint8, device=self._context.device)
        self._exchange(torch.cat([*tails.values()]), sizes, received, back).wait()
        return _split(received.cpu(), back)


def _split(buffer: Tensor, sizes: Mapping[int, int]) -> dict[int, Tensor]:
    return dict(zip(sizes, torch.split(buffer, list(sizes.values())), strict=True))
