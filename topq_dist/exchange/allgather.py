"""All-gather: every rank's frame goes to every rank."""

from __future__ import annotations

from torch import Tensor

from topq_dist.compress.aggregate import sum_exceeds
from topq_dist.compress.codec.frame import Frame, decode_frame
from topq_dist.compress.coherence import NO_COHERENCE
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.layout import LayoutCache
from topq_dist.exchange.base import Exchange, Outgoing
from topq_dist.exchange.collectives import AllGatherLane, CommContext, FrameAllGather


class AllGather(Exchange):
    """Every rank's frame goes to every rank: no further loss, and W - 1 frames on each link."""

    def __init__(self, context: CommContext, compressor: TopKCompressor) -> None:
        self._context = context
        self.compressor = compressor
        self._lanes = LayoutCache(AllGatherLane)

    def launch(self, outgoing: Outgoing) -> AllGatherWork:
        gather = FrameAllGather(
            None if outgoing.frames is None else outgoing.frames[0],
            self._lanes.of(outgoing.layout),
            self._context,
            settings_digest=outgoing.settings_digest,
            coherence=outgoing.coherence,
        )
        return AllGatherWork(outgoing, gather, self.compressor, self._context.rank)


class AllGatherWork:
    """Frames on their way to every rank; `frames` are those of the group, once received."""

    def __init__(
        self,
        outgoing: Outgoing,
        gather: FrameAllGather,
        compressor: TopKCompressor,
        rank: int,
    ) -> None:
        self._numel = outgoing.bucket.numel()
        self._compressed = outgoing.compressed
        self._gather = gather
        self._compressor = compressor
        self._rank = rank
        self._decoded: list[Frame] = []
        self.frames: list[Tensor] = []
        self.coherence = NO_COHERENCE

    def advance(self) -> None:
        pass

    def receive(self) -> bool:
        self.frames = self._gather.frames()
        self.coherence = self._gather.coherence
        own, numel = None if self._compressed is None else self._compressed.own, self._numel
        self._decoded = [
            own if own is not None and rank == self._rank else decode_frame(frame, numel=numel)
            for rank, frame in enumerate(self.frames)
        ]
        return all(frame.finite for frame in self._decoded)

    def exceeds(self, limit: float) -> bool:
        return sum_exceeds(self._decoded, divisor=len(self._decoded), limit=limit)

    def deliver(self, *, per_frame: int = 1) -> None:
        """Write the average, of sums over so many ranks each, and update the residual."""
        if self._compressed is None:
            raise RuntimeError("a rank that has failed has nothing to deliver")
        self._compressor.update_and_write(
            self._compressed, self._decoded, divisor=len(self._decoded) * per_frame
        )
