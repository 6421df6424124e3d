"""Ways of turning every rank's gradient bucket into the average on every rank.

Each is launched while the backward pass goes on. When it is over every bucket is received, and
only if all of them are finite is any delivered: a step that overflowed on any rank is void, and
until then nothing that a rank owes has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.compress.compressor import Compressed, FlatCompressor, average, is_finite
from topq_dist.compress.feedback import Layout
from topq_dist.ddp.messages import FrameGather, Slot, member
from topq_dist.telemetry import Meter


@dataclass(frozen=True, kw_only=True)
class Link:
    """The ranks that an exchange runs among."""

    group: dist.ProcessGroup
    device: torch.device
    meter: Meter

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return self.group.rank()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One bucket to be averaged in place.

    compress(parts) returns the frames of `parts` Parts of the bucket, or None where this rank has
    failed and must tell the others.
    """

    bucket: Tensor
    layout: Layout
    settings_digest: int
    compress: Callable[[int], Compressed | None]


class Pending(Protocol):
    """A bucket on its way; every method is called once, on every rank in the same order."""

    def advance(self) -> None:
        """Launch what had to wait for a first collective; never raises ExchangeError."""

    def receive(self) -> bool:
        """Wait for the other ranks, and return whether the average is finite.

        Raises ExchangeError on every rank or on none.
        """

    def deliver(self) -> None:
        """Write the average into the bucket, and keep what was not sent."""


class Exchange(Protocol):
    """A way of averaging buckets."""

    def launch(self, job: Job) -> Pending:
        """Start on one bucket, without waiting for other ranks where that can be helped."""


class AllGather:
    """Every rank's frame goes to every rank: no further loss, and W - 1 frames on each link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._slots: dict[Layout, Slot] = {}

    def launch(self, job: Job) -> Gathering:
        compressed = job.compress(1)
        gather = FrameGather(
            None if compressed is None else compressed.frames[0],
            settings_digest=job.settings_digest,
            slot=self._slots.setdefault(job.layout, Slot()),
            group=self._link.group,
            device=self._link.device,
            meter=self._link.meter,
        )
        return Gathering(job.bucket, compressed, gather)


class Gathering:
    """Frames on their way to every rank; `frames` are those of the group, once received."""

    def __init__(self, bucket: Tensor, compressed: Compressed | None, gather: FrameGather) -> None:
        self._bucket = bucket
        self._compressed = compressed
        self._gather = gather
        self.frames: list[Tensor] = []

    def advance(self) -> None:
        pass

    def receive(self) -> bool:
        self.frames = self._gather.frames()
        return all(is_finite(frame) for frame in self.frames)

    def deliver(self) -> None:
        if self._compressed is not None:
            self._compressed.commit()
        average(self.frames, out=self._bucket)


class Dense:
    """Plain all-reduce, where nothing beats it; what is still owed is paid with the gradient."""

    def __init__(self, link: Link, compressor: FlatCompressor) -> None:
        self._link = link
        self._compressor = compressor

    def launch(self, job: Job) -> Pending:
        return _Reducing(job, self._link, self._compressor)


class _Reducing:
    def __init__(self, job: Job, link: Link, compressor: FlatCompressor) -> None:
        self._job = job
        self._link = link
        self._compressor = compressor
        self._paying = compressor.add_owed(job.layout, job.bucket)
        job.bucket.div_(link.size)
        work = dist.all_reduce(job.bucket, group=link.group, async_op=True)
        self._work = member(work)
        sent_bytes = job.bucket.nbytes
        link.meter.add(
            sent_bytes=sent_bytes, wire_bytes=2 * sent_bytes * (link.size - 1) // link.size
        )

    def advance(self) -> None:
        pass

    def receive(self) -> bool:
        with self._link.meter.timed("wait_s"):
            self._work.wait()
        # with nothing owed there is nothing to protect: overflow shows in the gradient, as it
        # does without a hook
        return not self._paying or bool(torch.isfinite(self._job.bucket).all())

    def deliver(self) -> None:
        if self._paying:
            self._compressor.residuals.drop(self._job.layout)
