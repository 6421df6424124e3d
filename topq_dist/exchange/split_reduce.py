"""Split-reduce: each rank reduces one part of the index space, and passes on its largest sums.

Two frames on each link whatever the number of ranks, where an all-gather puts W - 1. Sources:
Renggli et al., "SparCML" (SC 2019); Li and Hoefler, "Near-Optimal Sparse Allreduce" (PPoPP 2022),
whose volume bound of 6k this keeps to 2k by one exchange for each half.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from topq_dist.compress.aggregate import decode_parts
from topq_dist.compress.codec.frame import Frame, FrameError
from topq_dist.compress.coherence import NO_COHERENCE, Coherence
from topq_dist.compress.compressor import FlatCompressor, Reduced
from topq_dist.compress.layout import ByLayout
from topq_dist.exchange.agreement import ExchangeError
from topq_dist.exchange.base import Exchange, Job, Link, Pending
from topq_dist.exchange.collectives import FrameSwap, Lanes


class SplitReduce(Exchange):
    """Send each part's frame to the rank that owns the part; gather the owners' reduced frames.

    An owner passes on the largest elements of its part, as many as a rank has sent it on average,
    and owes the rest itself; without error feedback it passes on all that are not zero.
    """

    def __init__(self, link: Link, compressor: FlatCompressor) -> None:
        self._link = link
        self._compressor = compressor
        self._lanes = ByLayout(lambda: (Lanes.among(link.size), Lanes.among(link.size)))

    def launch(self, job: Job) -> Pending:
        return _Splitting(job, self._link, self._compressor, *self._lanes.of(job.layout))


class _Splitting:
    def __init__(
        self, job: Job, link: Link, compressor: FlatCompressor, lanes: Lanes, reduced_lanes: Lanes
    ) -> None:
        self._job = job
        self._link = link
        self._compressor = compressor
        self._reduced_lanes = reduced_lanes
        self._compressed = job.compress(link.size)
        self._reduction: Reduced | None = None
        self._error: ExchangeError | None = None
        self._failure: FrameError | None = None
        self._reduced: list[Frame] = []
        self._gather: FrameSwap | None = None
        self.coherence = NO_COHERENCE
        if self._compressed is None:
            self._scatter = self._swap(None, lanes)
        else:
            self._scatter = self._swap(self._compressed.frames, lanes, self._compressed.coherence)

    def _swap(
        self, frames: Sequence[Tensor] | None, lanes: Lanes, coherence: Coherence = NO_COHERENCE
    ) -> FrameSwap:
        return FrameSwap(
            frames,
            coherence=coherence,
            settings_digest=self._job.settings_digest,
            lanes=lanes,
            group=self._link.group,
            device=self._link.device,
            meter=self._link.meter,
        )

    def advance(self) -> None:
        try:
            frames = self._scatter.frames()
        except ExchangeError as error:
            self._error = error
            return
        # of the second swap, the owners of the parts have nothing to add
        self.coherence = self._scatter.coherence
        reduced = self._reduce(frames)
        # an all-gather would pad all of them to the longest
        self._gather = self._swap(
            None if reduced is None else [reduced] * self._link.size, self._reduced_lanes
        )

    def _reduce(self, frames: list[Tensor]) -> Tensor | None:
        try:
            with self._link.meter.timed("select_s"):
                self._reduction = self._compressor.reduce(
                    frames, self._job.layout, part=self._link.rank, parts=self._link.size
                )
        except FrameError as error:
            # raised once the other ranks have been told
            self._failure = error
            return None
        return self._reduction.frame

    def receive(self) -> bool:
        if self._error is not None:
            raise self._error
        if self._gather is None:
            raise RuntimeError("receive comes after advance")
        try:
            frames = self._gather.frames()
        except ExchangeError as error:
            raise self._failure or error from None
        self._reduced = decode_parts(frames, numel=self._job.bucket.numel())
        return all(frame.finite for frame in self._reduced)

    def deliver(self) -> None:
        if self._compressed is None or self._reduction is None:
            raise RuntimeError("a rank that has failed has nothing to deliver")
        self._compressed.commit_and_write(self._reduced, divisor=1)
        self._reduction.commit()
