"""Ways of turning every rank's gradient bucket into the average on every rank.

Each is launched while the backward pass goes on. When it is over every bucket is received, and
only if all of them are finite is any delivered: a step that overflowed on any rank is void, and
until then nothing that a rank owes has changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.compress.by_layout import ByLayout
from topq_dist.compress.coherence import NO_COHERENCE, Coherence
from topq_dist.compress.compressor import Compressed, FlatCompressor
from topq_dist.compress.feedback import Layout
from topq_dist.compress.frame import Frame, decode_frame
from topq_dist.ddp.messages import FrameGather, GatherLane, member
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

    @property
    def coherence(self) -> Coherence:
        """The sum over all ranks, once received; nothing where none was measured."""

    def advance(self) -> None:
        """Launch what had to wait for a first collective; never raises ExchangeError."""

    def receive(self) -> bool:
        """Wait for the other ranks, and return whether the average is finite.

        Raises ExchangeError on every rank or on none.
        """

    def deliver(self) -> None:
        """Write the average into the bucket, and keep what was not sent."""


class Exchange(ABC):
    """A way of averaging buckets.

    tells: whether every rank's frames tell every other rank of its settings and of a failure;
    where they do not, the pipeline does. sparse: whether the step that has begun sends a part of
    each gradient, and not all of it. chosen: what "auto" has decided on, None for all others.
    dense_steps: how many steps have sent everything, by which the residual is paid out; 0 of one
    that never does.
    """

    tells = True
    sparse = True
    chosen: str | None = None
    dense_steps = 0

    @abstractmethod
    def launch(self, job: Job) -> Pending:
        """Start on one bucket, without waiting for other ranks where that can be helped."""

    def begin_step(self) -> None:  # noqa: B027 - most have nothing to note
        """Take note of a new step, before its first bucket; on every rank alike."""

    def settings(self) -> str:
        """Return what must be the same on every rank in the step that has begun."""
        return ""

    def check_chosen(self, chosen: str | None) -> None:  # noqa: B027
        """Raise ValueError unless `resume` can take this up."""

    def resume(self, chosen: str | None, dense_steps: int) -> None:  # noqa: B027
        """Take up what "auto" had chosen in the run that is resumed, and its dense_steps."""


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


# all at once, what many sparse steps have left would be one step many times as long
_PAY_STEPS = 32


class Dense(Exchange):
    """Plain all-reduce, where nothing beats it.

    What is still owed is paid in equal shares with the gradients of 32 steps, the first
    `unpaid_steps` left out.
    """

    tells = False
    sparse = False

    def __init__(self, link: Link, compressor: FlatCompressor, *, unpaid_steps: int = 0) -> None:
        self._link = link
        self._compressor = compressor
        self._unpaid_steps = unpaid_steps

    def begin_step(self) -> None:
        self.dense_steps += 1

    def resume(self, chosen: str | None, dense_steps: int) -> None:
        self.dense_steps = dense_steps

    def launch(self, job: Job) -> Pending:
        step = self.dense_steps - 1
        left = self._unpaid_steps + _PAY_STEPS - step
        share = 0.0 if step < self._unpaid_steps else 1.0 / max(1, left)
        return _Reducing(job, self._link, self._compressor, share)


class _Reducing:
    coherence = NO_COHERENCE

    def __init__(self, job: Job, link: Link, compressor: FlatCompressor, share: float) -> None:
        self._job = job
        self._link = link
        self._compressor = compressor
        self._payment = compressor.pay(job.layout, job.bucket, share) if share else None
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
        return self._payment is None or bool(torch.isfinite(self._job.bucket).all())

    def deliver(self) -> None:
        if self._payment is not None:
            self._payment()
