"""Split-reduce: each rank reduces one part of the index space, and passes on its largest sums.

Two frames on each link whatever the number of ranks, where an all-gather puts W - 1. Sources:
Renggli et al., "SparCML" (SC 2019); Li and Hoefler, "Near-Optimal Sparse Allreduce" (PPoPP 2022),
whose volume bound of 6k this keeps to 2k by one exchange for each half.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from topq_dist.compress.aggregate import decode_partition, sum_exceeds
from topq_dist.compress.codec.frame import Frame, FrameError
from topq_dist.compress.coherence import NO_COHERENCE, Coherence
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.layout import LayoutCache
from topq_dist.compress.reduce import PartReducer, Reduced
from topq_dist.exchange.agreement import ExchangeError
from topq_dist.exchange.base import Exchange, ExchangeWork, Outgoing
from topq_dist.exchange.collectives import AllToAllLanes, CommContext, FrameAllToAll


class SplitReduce(Exchange):
    """Send each part's frame to the rank that owns the part; gather the owners' reduced frames.

    An owner passes on the largest elements of its part, as many as a rank has sent it on average,
    and keeps the rest in its own residual; without error feedback it passes on all that are not
    zero.
    """

    def __init__(self, context: CommContext, compressor: TopKCompressor) -> None:
        self.frames_per_bucket = context.size
        self._context = context
        self.compressor = compressor
        self._reducer = PartReducer(compressor.residuals if compressor.error_feedback else None)
        self._lanes = LayoutCache(
            lambda: (AllToAllLanes.among(context.size), AllToAllLanes.among(context.size))
        )

    def launch(self, outgoing: Outgoing) -> ExchangeWork:
        return SplitReduceWork(
            outgoing,
            self._context,
            self.compressor,
            self._reducer,
            self._lanes.of(outgoing.layout),
        )


class SplitReduceWork:
    """A bucket's parts on their way to their owners, and then the reduced parts to every rank."""

    def __init__(
        self,
        outgoing: Outgoing,
        context: CommContext,
        compressor: TopKCompressor,
        reducer: PartReducer,
        lanes: tuple[AllToAllLanes, AllToAllLanes],
    ) -> None:
        self._outgoing = outgoing
        self._context = context
        self._compressor = compressor
        self._reducer = reducer
        self._reduced_lanes = lanes[1]
        self._reduced: Reduced | None = None
        self._error: ExchangeError | None = None
        self._failure: FrameError | None = None
        self._decoded: list[Frame] = []
        self._gather: FrameAllToAll | None = None
        self.coherence = NO_COHERENCE
        self._scatter = self._exchange(outgoing.frames, lanes[0], outgoing.coherence)

    def _exchange(
        self,
        frames: Sequence[Tensor] | None,
        lanes: AllToAllLanes,
        coherence: Coherence = NO_COHERENCE,
    ) -> FrameAllToAll:
        digest = self._outgoing.settings_digest
        return FrameAllToAll(
            frames, lanes, self._context, settings_digest=digest, coherence=coherence
        )

    def advance(self) -> None:
        try:
            frames = self._scatter.frames()
        except ExchangeError as error:
            self._error = error
            return
        # of the second exchange, the owners of the parts have nothing to add
        self.coherence = self._scatter.coherence
        reduced = self._reduce(frames)
        # an all-gather would pad all of them to the longest
        self._gather = self._exchange(
            None if reduced is None else [reduced] * self._context.size, self._reduced_lanes
        )

    def _reduce(self, frames: list[Tensor]) -> Tensor | None:
        compressed = self._outgoing.compressed
        try:
            with self._context.meter.timed("select_s"):
                self._reduced = self._reducer.reduce(
                    frames,
                    self._outgoing.layout,
                    part=self._context.rank,
                    parts=self._context.size,
                    in_segments=compressed is not None and compressed.in_segments,
                )
        except FrameError as error:
            # raised once the other ranks have been told
            self._failure = error
            return None
        return self._reduced.frame

    def receive(self) -> bool:
        if self._error is not None:
            raise self._error
        if self._gather is None:
            raise RuntimeError("receive comes after advance")
        try:
            frames = self._gather.frames()
        except ExchangeError as error:
            raise self._failure or error from None
        self._decoded = decode_partition(frames, numel=self._outgoing.bucket.numel())
        return all(frame.finite for frame in self._decoded)

    def exceeds(self, limit: float) -> bool:
        return sum_exceeds(self._decoded, divisor=1, limit=limit)

    def deliver(self) -> None:
        compressed = self._outgoing.compressed
        if compressed is None or self._reduced is None:
            raise RuntimeError("a rank that has failed has nothing to deliver")
        self._compressor.update_and_write(compressed, self._decoded, divisor=1)
        self._compressor.residuals.apply(self._reduced.update)
