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

from topq_dist.compress.coherence import Coherence
from topq_dist.compress.compressor import Compressed
from topq_dist.compress.layout import Layout
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
