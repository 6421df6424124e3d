"""Rounds over a process group: begun at their steps, received `overlap` steps later.

Every rank begins and receives the same rounds at the same steps, so that all issue their
collectives in one order. A round in which one rank's change is not finite is void on all, those
with other shards of the model, or in the same node, included:
parameters, outer parameters and residuals stay what they are, and the next round has the change of
both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from topq_dist.compress.coherence import NO_COHERENCE
from topq_dist.compress.compressor import Compressed
from topq_dist.compress.residual import ResidualUpdate
from topq_dist.compress.unsent import UnsentWatch
from topq_dist.exchange.agreement import (
    ExchangeError,
    SettingsDifferError,
    check_same_on_all_ranks,
    digest,
)
from topq_dist.exchange.base import Exchange, ExchangeWork, Outgoing
from topq_dist.exchange.collectives import AllGatherLane, CommContext, FrameAllGather
from topq_dist.exchange.shards import Outcome, agree_on_outcome, tell_of_failed_step
from topq_dist.exchange.slots import NO_FRAME
from topq_dist.local.replica import Replica, Round
from topq_dist.local.settings import LocalSettings
from topq_dist.profiling import labelled

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _InFlight:
    """A round under way. received_at: the step at whose end it is received.

    settings, failure: this rank's, for when others have other settings or none. update: of the
    residual, where somebody looks on.
    """

    begun: Round
    work: ExchangeWork
    received_at: int
    settings: str
    failure: Exception | None
    announcement: FrameAllGather | None
    update: ResidualUpdate | None


class Rounds:
    """The rounds of one rank among those of the context that it has entered.

    commit: called once a round is received whole, before anything of it is applied; returns where
    every rank has it, and raises where one has not. alike: returns what else ranks must have alike
    when a round begins.
    """

    def __init__(
        self,
        replica: Replica,
        settings: LocalSettings,
        commit: Callable[[], None] | None = None,
        *,
        alike: Callable[[], str] = str,
    ) -> None:
        self._context: CommContext
        self._exchange: Exchange
        self._replica = replica
        self._settings = settings
        self._commit = commit
        self._alike = alike
        self._in_flight: dict[int, _InFlight] = {}
        self._announcing: list[AllGatherLane] = []
        self.void = 0
        # of each fragment, void ones since the last that was not
        self._in_a_row: dict[int, int] = {}
        # one for each fragment, once somebody looks on
        self.watches: tuple[UnsentWatch, ...] = ()

    def enter(self, context: CommContext, exchange: Exchange) -> None:
        """Exchange among these ranks from now on; what is under way is as if it had never been."""
        self._context = context
        self._exchange = exchange
        self._announcing = [AllGatherLane() for _ in self._replica.fragments]
        self.drop()

    def end_step(self, step: int) -> None:
        """Receive and begin what is due at the end of an inner step, counted from 1.

        Raises ExchangeError, on every rank, where ranks disagree or one has failed; the round is
        then as one that never was.
        """
        self._receive(step)
        for fragment in self.due(step):
            # one that a run with other settings had under way
            if fragment in self._in_flight:
                self._finish(self._in_flight.pop(fragment))
            self.begin(self._replica.begin(fragment), step, step + self._settings.overlap)
        self._receive(step)

    def due(self, step: int) -> list[int]:
        """Return the fragments of which a round begins at the end of a step."""
        fragments = range(len(self._replica.fragments))
        return [fragment for fragment in fragments if self._settings.due(fragment, step)]

    def begin(self, begun: Round, step: int, received_at: int) -> None:
        """Compress a round's change and send it on its way."""
        self._exchange.begin_step()
        settings = f"step={step} fragment={begun.fragment} q={self._replica.q}"
        settings = f"{settings} frozen={begun.frozen}"
        settings = f"{settings}\n{self._settings.text()}\n{self._replica.compressor.settings()}"
        settings = f"{settings}\n{self._alike()}"
        compressed, failure = None, None
        self._exchange.prepare(begun.vector)
        if self._exchange.frames_per_bucket:
            try:
                compressed = self._compress(begun)
            except Exception as error:  # noqa: BLE001 - raised once the other ranks have been told
                failure = error
        announcement = None
        if not self._exchange.carries_settings:
            announcement = FrameAllGather(
                NO_FRAME if failure is None else None,
                self._announcing[begun.fragment],
                self._context,
                settings_digest=digest(settings),
            )
        layout = self._replica.layout(begun.fragment)
        work = self._exchange.launch(Outgoing(begun.vector, layout, compressed, digest(settings)))
        self._in_flight[begun.fragment] = _InFlight(
            begun=begun,
            work=work,
            received_at=received_at,
            settings=settings,
            failure=failure,
            announcement=announcement,
            update=None if compressed is None else self._watched(begun.fragment, compressed),
        )

    def _watched(self, fragment: int, compressed: Compressed) -> ResidualUpdate | None:
        if not self.watches:
            return None
        self.watches[fragment].compressed(compressed.update)
        return compressed.update

    def _compress(self, begun: Round) -> Compressed:
        meter = self._context.meter
        with meter.timed("select_s"), labelled("select and encode"):
            compressed = self._replica.compress(begun, parts=self._exchange.frames_per_bucket)
        meter.encode_s += compressed.encode_s
        return compressed

    def launched(self) -> Mapping[int, tuple[int, Tensor]]:
        """Return of each fragment under way the step that receives it and its parameters then."""
        return {
            fragment: (flight.received_at, flight.begun.launched)
            for fragment, flight in self._in_flight.items()
            if flight.begun.launched is not None
        }

    def drop(self) -> None:
        """Forget what is under way, on every rank alike."""
        self._in_flight = {}
        for watch in self.watches:
            watch.void()

    def receive_all(self) -> None:
        """Receive every round that is under way."""
        for fragment in list(self._in_flight):
            self._finish(self._in_flight.pop(fragment))

    def _receive(self, step: int) -> None:
        due = [f for f, flight in self._in_flight.items() if flight.received_at <= step]
        for fragment in due:
            self._finish(self._in_flight.pop(fragment))

    def _finish(self, flight: _InFlight) -> None:
        try:
            mine = Outcome(self._received(flight), NO_COHERENCE)
        except Exception as error:
            tell_of_failed_step(error, self._context)
            raise
        outcome = agree_on_outcome(mine, lambda: flight.settings, self._context)
        if self._commit is not None:
            self._commit()
        if not outcome.finite:
            self._void(flight.begun)
            self._replica.release(flight.begun)
            return
        self._in_a_row.pop(flight.begun.fragment, None)
        with labelled("average and update residuals"):
            flight.work.deliver()
            self._replica.finish(flight.begun)
        if self.watches and flight.update is not None:
            self.watches[flight.begun.fragment].applied([flight.update])

    def _received(self, flight: _InFlight) -> bool:
        """Wait for the ranks of the group, and return whether the mean of a round is finite."""
        try:
            if flight.announcement is not None:
                flight.announcement.frames()
            flight.work.advance()
            return flight.work.receive()
        except SettingsDifferError:
            # every rank is here, having read the same digests, and may ask for the particulars
            check_same_on_all_ranks(
                flight.settings, group=self._context.group, device=self._context.device
            )
            raise
        except ExchangeError as error:
            raise flight.failure or error from None

    def _void(self, begun: Round) -> None:
        self.void += 1
        self._context.meter.void_steps += 1
        if self.watches:
            self.watches[begun.fragment].void()
        in_a_row = self._in_a_row.get(begun.fragment, 0) + 1
        self._in_a_row[begun.fragment] = in_a_row
        # ever more rarely: a rank whose parameters are lost says the same at every round
        is_power_of_two = in_a_row & (in_a_row - 1) == 0
        _log.log(
            logging.WARNING if is_power_of_two else logging.DEBUG,
            "a round is void on every rank, since a change of parameters from %s on is not finite "
            "on some rank: %d of them in a row. Nothing of it is lost, and rounds go on once it is "
            "finite again; a rank whose parameters are not must load a state that is",
            self._replica.layout(begun.fragment).names[0],
            in_a_row,
        )
