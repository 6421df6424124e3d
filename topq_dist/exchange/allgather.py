"""Every rank's frame goes to every rank."""

from __future__ import annotations

from torch import Tensor

from topq_dist.compress.codec.frame import Frame, decode_frame
from topq_dist.compress.coherence import NO_COHERENCE
from topq_dist.compress.compressor import Compressed
from topq_dist.compress.layout import ByLayout
from topq_dist.exchange.base import Exchange, Job, Link
from topq_dist.exchange.collectives import FrameGather, GatherLane


class AllGather(Exchange):
    """Every rank's frame goes to every rank: no further loss, and W - 1 frames on each link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._kept = ByLayout(GatherLane)

    def launch(self, job: Job) -> Gathering:
        compressed = job.compress(1)
        gather = FrameGather(
            None if compressed is None else compressed.frames[0],
            settings_digest=job.settings_digest,
            lane=self._kept.of(job.layout),
            group=self._link.group,
            device=self._link.device,
            meter=self._link.meter,
            coherence=NO_COHERENCE if compressed is None else compressed.coherence,
        )
        return Gathering(job.bucket, compressed, gather, self._link.rank)


class Gathering:
    """Frames on their way to every rank; `frames` are those of the group, once received."""

    def __init__(
        self, bucket: Tensor, compressed: Compressed | None, gather: FrameGather, rank: int
    ) -> None:
        self._rank = rank
        self._bucket = bucket
        self._compressed = compressed
        self._gather = gather
        self._decoded: list[Frame] = []
        self.frames: list[Tensor] = []
        self.coherence = NO_COHERENCE

    def advance(self) -> None:
        pass

    def receive(self) -> bool:
        self.frames = self._gather.frames()
        self.coherence = self._gather.coherence
        numel = self._bucket.numel()
        own = None if self._compressed is None else self._compressed.own
        self._decoded = [
            own if own is not None and rank == self._rank else decode_frame(frame, numel=numel)
            for rank, frame in enumerate(self.frames)
        ]
        return all(frame.finite for frame in self._decoded)

    def deliver(self) -> None:
        if self._compressed is None:
            raise RuntimeError("a rank that has failed has nothing to deliver")
        self._compressed.commit_and_write(self._decoded, divisor=len(self._decoded))
