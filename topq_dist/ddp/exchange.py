"""Ways of turning every rank's gradient bucket into the average on every rank.

Each is launched while the backward pass goes on, and finished when it is over. Between the two
comes `advance`, called on every rank at the same point of its sequence of collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.compress.compressor import FlatCompressor, average
from topq_dist.compress.feedback import Layout
from topq_dist.ddp.messages import FrameGather, Slot
from topq_dist.telemetry import Meter


@dataclass(frozen=True, kw_only=True)
class Link:
    """What every exchange needs to know of the ranks it runs among."""

    group: dist.ProcessGroup
    device: torch.device
    meter: Meter

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return self.group.size()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One bucket to be averaged in place.

    frames(parts) compresses it into one frame for each of `parts` equal stretches of its index
    space, or returns None where this rank has failed and must tell the others.
    """

    bucket: Tensor
    layout: Layout
    settings_digest: int
    frames: Callable[[int], list[Tensor] | None]


class Pending(Protocol):
    """A bucket on its way."""

    def advance(self) -> None:
        """Launch what must wait for a first collective; called once, in bucket order."""

    def finish(self) -> None:
        """Write the average into the bucket; raises ExchangeError on every rank or on none."""


class Exchange(Protocol):
    """A way of averaging buckets."""

    def launch(self, job: Job) -> Pending:
        """Start on one bucket without waiting for other ranks where that can be helped."""


class AllGather:
    """Every rank's frame goes to every rank: exact, and W - 1 frames on each link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._slots: dict[Layout, Slot] = {}

    def launch(self, job: Job) -> Pending:
        frames = job.frames(1)
        gather = FrameGather(
            None if frames is None else frames[0],
            settings_digest=job.settings_digest,
            slot=self._slots.setdefault(job.layout, Slot()),
            group=self._link.group,
            device=self._link.device,
            meter=self._link.meter,
        )
        return _Gathering(job.bucket, gather)


@dataclass(frozen=True)
class _Gathering:
    bucket: Tensor
    gather: FrameGather

    def advance(self) -> None:
        pass

    def finish(self) -> None:
        average(self.gather.frames(), out=self.bucket)


class Dense:
    """Plain all-reduce, for links on which nothing beats it; what is still owed is paid first."""

    def __init__(self, link: Link, compressor: FlatCompressor) -> None:
        self._link = link
        self._compressor = compressor

    def launch(self, job: Job) -> Pending:
        self._compressor.pay(job.layout, job.bucket)
        job.bucket.div_(self._link.size)
        work = dist.all_reduce(job.bucket, group=self._link.group, async_op=True)
        sent_bytes = job.bucket.nbytes
        size = self._link.size
        self._link.meter.add(sent_bytes=sent_bytes, wire_bytes=2 * sent_bytes * (size - 1) // size)
        return _Reducing(work, self._link.meter)


@dataclass(frozen=True)
class _Reducing:
    work: dist.Work
    meter: Meter

    def advance(self) -> None:
        pass

    def finish(self) -> None:
        with self.meter.timed("wait_s"):
            self.work.wait()
