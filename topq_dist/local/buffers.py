"""The first rank's buffers on their way to the others, every so many inner steps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from topq_dist.exchange.collectives import CommContext
from topq_dist.local.first_rank import FirstRanks
from topq_dist.local.model import LocalModel
from topq_dist.local.settings import LocalSettings


class BufferRounds:
    """Sends buffers as `settings.buffers` has it; with "own" nothing is ever sent.

    commit: as for Rounds.
    """

    def __init__(
        self, model: LocalModel, settings: LocalSettings, commit: Callable[[], None] | None
    ) -> None:
        self._context: CommContext
        self._model = model
        self._settings = settings
        self._commit = commit
        self._in_flight: tuple[int, FirstRanks] | None = None
        self._resumed: tuple[int, Tensor] | None = None

    def enter(self, context: CommContext) -> None:
        """Send among these ranks from now on; what is under way is as if it had never been."""
        self._context = context
        self.resume(None)

    def end_step(self, step: int) -> None:
        """Receive and send what is due at the end of an inner step."""
        if self._settings.buffers == "own":
            return
        if self._in_flight is not None and self._in_flight[0] <= step:
            self._receive()
        if step % self._settings.every == 0:
            # of a run with other settings they may still be under way
            self._receive()
            self._launch(step + self._settings.overlap)
            if not self._settings.overlap:
                self._receive()

    def synchronize(self, step: int) -> None:
        """Have every rank take the first one's now."""
        if self._settings.buffers == "first":
            self._receive()
            self._launch(step)
            self._receive()

    def under_way(self) -> tuple[int, Tensor] | None:
        """Return what is on its way, as FirstRanks.payload, and the step that receives it."""
        if self._in_flight is None:
            return self._resumed
        received_at, on_their_way = self._in_flight
        return received_at, on_their_way.payload

    def resume(self, under_way: tuple[int, Tensor] | None) -> None:
        """Forget what is under way; have this be instead, once `begin_resumed` is called."""
        self._in_flight = None
        self._resumed = None if self._settings.buffers == "own" else under_way

    def begin_resumed(self) -> None:
        """Send once more what a saved run had under way."""
        if self._resumed is not None:
            received_at, payload = self._resumed
            self._resumed = None
            self._launch(received_at, payload)

    def _launch(self, received_at: int, payload: Tensor | None = None) -> None:
        buffers = list(self._model.buffers().values())
        if buffers:
            self._in_flight = received_at, FirstRanks(buffers, self._context, payload=payload)

    def _receive(self) -> None:
        if self._in_flight is not None:
            buffers = list(self._model.buffers().values())
            self._in_flight[1].receive(self._commit, into=buffers)
            self._in_flight = None
