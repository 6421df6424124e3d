"""Exchanges of a rank whose peers may be lost, and come back.

Where an exchange fails, the ranks that are left make a group among themselves and go on; it is as
one that never was. A rank that comes in takes everything but residuals, which are each rank's own,
from one that has been in the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from topq_dist.elastic.errors import MemberLostError
from topq_dist.elastic.group import WatchedGroup
from topq_dist.elastic.membership import Epoch, Membership
from topq_dist.exchange.agreement import check_same_on_all_ranks, gather_texts
from topq_dist.exchange.collectives import CommContext
from topq_dist.exchange.handed_state import hand_state

_log = logging.getLogger(__name__)


class LostResidual(NamedTuple):
    """A rank that was lost with what it had not sent, and the step when that was known."""

    member: str
    step: int


class ElasticRank(Protocol):
    """What an epoch asks of a rank."""

    @property
    def steps_taken(self) -> int:
        """Steps that it has taken."""

    def enter(self, context: CommContext) -> None:
        """Exchange in this context from now on, and forget what is under way; a collective."""

    def state_for_peer(self) -> dict[str, Any]:
        """Return what a newcomer takes."""

    def take_state(self, state: Mapping[str, Any]) -> None:
        """Take what a peer's `state_for_peer` has returned."""

    def skip_exchanges_until(self, step: int) -> None:
        """Begin no exchange up to this step, as peers that are at it have none any more."""


class Epochs:
    """Exchanges among those that are in the run, each of which counts for all or for none.

    rank: whose exchanges these are; asked for what a newcomer takes, and told of the group.
    context: device and meter; its group is never used.
    """

    def __init__(
        self, membership: Membership, rank: ElasticRank, context: CommContext, settings: str
    ) -> None:
        self.membership = membership
        self.lost: list[LostResidual] = []
        self.names: tuple[str, ...] = ()
        self.came_in = False
        self._rank = rank
        self._context = context
        self._settings = settings
        self._group: WatchedGroup | None = None
        self._ends = False

    def commit(self) -> None:
        """Return once every member has received what this one has; MemberLostError if one never."""
        self._ends |= self.membership.decide()

    def run(self, exchange: Callable[[], None], *, begins: bool = True) -> bool:
        """Exchange, and return whether it went through; go over to the next epoch where one ends.

        begins: whether that is done at once where an exchange has gone through, and not left to
        `begin_if_over`. What has not gone through by then is void on every rank, or not on any.
        Raises RuntimeError after `close`.
        """
        if self.membership.has_left:
            raise RuntimeError("this process has left the run: expected no exchange after close")
        try:
            exchange()
        except Exception as error:  # noqa: BLE001 - torch may have put one in a loss's place
            self._raise_unless_lost(error)
            _log.warning("an exchange is void on every rank: %s", error)
            is_void = True
        else:
            is_void = False
        if is_void:
            self.begin()
            return False
        if begins:
            self.begin_if_over()
        return True

    def begin_if_over(self) -> None:
        """Begin the next epoch, if the last exchange that counted has ended this one."""
        if self._ends:
            self.begin()

    def begin(self) -> None:
        """Begin an epoch that all its members have begun, with the same state.

        Raises ExchangeError on every rank where they disagree, RefusedError where this one cannot
        come in.
        """
        while True:
            self._leave()
            epoch = self.membership.next_epoch()
            self.lost += [LostResidual(name, self._rank.steps_taken) for name in epoch.lost]
            try:
                self._begin(epoch)
            except Exception as error:  # noqa: BLE001 - as above
                self._raise_unless_lost(error)
                _log.info("epoch %d did not begin: %s", epoch.number, error)
            else:
                return

    def _begin(self, epoch: Epoch) -> None:
        self._ends = False
        store, check = self.membership.store, self.membership.check
        size = len(epoch.members)
        self._group = WatchedGroup(store, epoch.rank, size, f"topq/{epoch.number}", check)
        context = replace(self._context, group=self._group)
        check_same_on_all_ranks(self._settings, group=self._group, device=context.device)
        texts = gather_texts(str(self._rank.steps_taken), group=self._group, device=context.device)
        handed = None
        if not all(member.has_state for member in epoch.members):
            mine = self._state_for_peer() if epoch.rank == epoch.source else None
            handed = hand_state(mine, context, source=epoch.source)
        self._rank.enter(context)
        takes = not self.membership.has_state and epoch.rank != epoch.source
        self.membership.decide()
        if takes and handed is not None:
            self.lost = [LostResidual(*one) for one in handed["lost"]]
            self._rank.take_state(handed["rank"])
            self.came_in |= epoch.members[epoch.source].has_state
        self.names = tuple(member.name for member in epoch.members)
        self._rank.skip_exchanges_until(max(int(text) for text in texts))

    def _raise_unless_lost(self, error: Exception) -> None:
        group_failed = self._group is not None and self._group.has_failed
        if not isinstance(error, MemberLostError) and not group_failed:
            raise error

    def _state_for_peer(self) -> dict[str, Any]:
        return {"lost": self.lost, "rank": self._rank.state_for_peer()}

    def check_may_load(self, steps_taken: int) -> None:
        """Raise RuntimeError where a state that is loaded would set this rank apart from others."""
        if self.came_in:
            raise RuntimeError(
                "load_state_dict after this process has come into an elastic run and taken the "
                f"state of its peers: expected it only at the start, and not at step {steps_taken}"
            )

    def _leave(self) -> None:
        if self._group is not None:
            self._group.leave()
            self._group = None

    def close(self) -> None:
        """Leave the run."""
        self._leave()
        self.membership.close()


def check_saves_own(*, all_ranks: bool) -> None:
    """Raise ValueError for the states of all ranks of an elastic run."""
    if all_ranks:
        raise ValueError(
            "all_ranks=True of an elastic run, in which ranks may be lost meanwhile: expected "
            "each rank to save its own"
        )
