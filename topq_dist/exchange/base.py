"""Ways of turning every rank's gradient bucket into the average on every rank.

Each is launched while the backward pass goes on. When it is over every bucket is received, and
only if all of them are finite is any delivered: a step that overflowed on any rank is void, and
until then no rank's residual has changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from topq_dist.compress.coherence import NO_COHERENCE, Coherence
from topq_dist.compress.compressor import Compressed, TopKCompressor
from topq_dist.compress.layout import Layout


class Outgoing(NamedTuple):
    """A bucket to be exchanged.

    bucket: 1-D, to be averaged in place. compressed: as many frames of it as are asked for; None
    where that is none, or this rank has failed and must tell the others. settings_digest: of what
    must be the same on every rank.
    """

    bucket: Tensor
    layout: Layout
    compressed: Compressed | None
    settings_digest: int

    @property
    def frames(self) -> Sequence[Tensor] | None:
        """The frames of the bucket, where there are any to send."""
        return None if self.compressed is None else self.compressed.frames

    @property
    def coherence(self) -> Coherence:
        """What this rank has measured."""
        return NO_COHERENCE if self.compressed is None else self.compressed.coherence


class ExchangeWork(Protocol):
    """A bucket on its way; each method is called once at most, on every rank in the same order."""

    @property
    def coherence(self) -> Coherence:
        """The sum over all ranks, once received; nothing where none was measured."""

    def advance(self) -> None:
        """Launch what had to wait for a first collective; never raises ExchangeError."""

    def receive(self) -> bool:
        """Wait for the other ranks, and return whether the average is finite.

        Raises ExchangeError on every rank or on none.
        """

    def exceeds(self, limit: float) -> bool:
        """Return whether a finite average has an element beyond `limit`; alike on every rank.

        Once received, and only where somebody asks.
        """

    def deliver(self) -> None:
        """Write the average into the bucket, and update the residual."""


class Exchange(ABC):
    """A way of averaging buckets.

    compressor: what makes the frames that it is given. frames_per_bucket: how many frames of a
    bucket this rank is to be given, each of one part of it (see BlockCyclicPartition); 0 where it
    needs none. carries_settings: whether every rank's frames tell every other rank of its settings
    and of a failure; where they do not, the pipeline does.
    sparse: whether the step that has begun sends a part of each gradient, and not all of it.
    chosen: what "auto" has decided on, None for all others. dense_steps: how many steps have sent
    everything, by which the residual is flushed; 0 of one that never does.
    """

    compressor: TopKCompressor
    frames_per_bucket = 1
    carries_settings = True
    sparse = True
    chosen: str | None = None
    dense_steps = 0

    def prepare(self, bucket: Tensor) -> None:  # noqa: B027 - most leave it as it is
        """Get a bucket ready to be compressed; on every rank alike."""

    def check_takes_unused(self) -> None:  # noqa: B027 - most do
        """Raise ValueError where what is selected may not differ from rank to rank."""

    @abstractmethod
    def launch(self, outgoing: Outgoing) -> ExchangeWork:
        """Start on one bucket, without waiting where that can be helped."""

    def begin_step(self) -> None:  # noqa: B027 - most have nothing to note
        """Take note of a new step, before its first bucket; on every rank alike."""

    def settings(self) -> str:
        """Return what must be the same on every rank in the step that has begun."""
        return ""

    def can_choose(self, chosen: str | None) -> bool:
        """Return whether `resume` can take this up."""
        return True

    def check_chosen(self, chosen: str | None) -> None:  # noqa: B027
        """Raise ValueError unless `resume` can take this up."""

    def resume(self, chosen: str | None, dense_steps: int) -> None:  # noqa: B027
        """Take up what "auto" had chosen in the run that is resumed, and its dense_steps.

        On every rank alike; residuals may be there from now on.
        """


class SwitchingExchange(Exchange):
    """One exchange at a time, `_current`."""

    _current: Exchange

    @property
    def compressor(self) -> TopKCompressor:  # type: ignore[override]
        return self._current.compressor

    @property
    def frames_per_bucket(self) -> int:  # type: ignore[override]
        return self._current.frames_per_bucket

    @property
    def carries_settings(self) -> bool:  # type: ignore[override]
        return self._current.carries_settings

    def prepare(self, bucket: Tensor) -> None:
        self._current.prepare(bucket)

    def check_takes_unused(self) -> None:
        self._current.check_takes_unused()

    def launch(self, outgoing: Outgoing) -> ExchangeWork:
        return self._current.launch(outgoing)
