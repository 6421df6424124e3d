"""An exchange rehearsed: it runs as it would, and what counts is the all-reduce behind it."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor

from topq_dist.compress.coherence import NO_COHERENCE
from topq_dist.exchange.base import Exchange, ExchangeWork, Outgoing


class Rehearsal:
    """A bucket exchanged by the exchange on trial, and then by "dense".

    gradient: a copy of the bucket from before. reducing: in which the second exchange runs.
    """

    coherence = NO_COHERENCE

    def __init__(
        self,
        work: ExchangeWork,
        outgoing: Outgoing,
        gradient: Tensor,
        dense: Exchange,
        reducing: AbstractContextManager[None],
    ) -> None:
        self._work = work
        self._outgoing = outgoing
        self._gradient = gradient
        self._dense = dense
        self._reducing = reducing
        self._finite = False

    def advance(self) -> None:
        self._work.advance()

    def receive(self) -> bool:
        self._finite = self._work.receive()
        # overflow shows in the gradient, as it does without a hook
        return True

    def exceeds(self, limit: float) -> bool:
        # as overflow
        return False

    def deliver(self) -> None:
        if self._finite:
            self._work.deliver()
        with self._reducing:
            self._outgoing.bucket.copy_(self._gradient)
            work = self._dense.launch(self._outgoing._replace(compressed=None))
            work.receive()
            work.deliver()
