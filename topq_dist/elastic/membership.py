"""Who is in the run: epochs of members, agreed on through a store that outlives all of them.

An epoch is a list of members that does not change. It is over when a member closes it: because an
exchange failed, a lease is over, or somebody waits to come in. Then all that live announce
themselves for the next one, and once every member of the old epoch has, or is lost, whoever sees it
first writes the next list; the store takes the first (compare-and-set), and all read that one.

A round counts for all members or for none. Each counts itself in once it has received everything;
whoever is the last to do so decides that the round counts, whoever sees the epoch end first that it
does not; the store takes the first of both, and all go by it. So a member that has received
everything never applies what another, which has not, must drop.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch.distributed as dist

from topq_dist.elastic.errors import MemberLostError, RefusedError, store_lost
from topq_dist.elastic.pulse import Pulse, beats_key
from topq_dist.elastic.settings import Elastic

_log = logging.getLogger(__name__)
_COUNTS, _COUNTS_AND_ENDS, _VOID = "counts", "counts and ends the epoch", "void"
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.05
_TELL_AFTER_S = 30.0


class Member(NamedTuple):
    """One process in the run. token: this process's alone; has_state: whether it has been in."""

    name: str
    token: str
    has_state: bool
    settings: str


class Epoch(NamedTuple):
    """Members by rank.

    lost: names that were in the run with the epoch before, and are not in this one.
    """

    number: int
    members: tuple[Member, ...]
    rank: int
    lost: tuple[str, ...]

    @property
    def source(self) -> int:
        """The rank that others take the run's state from: the first that has it, or the first."""
        return next((r for r, member in enumerate(self.members) if member.has_state), 0)


class Membership:
    """This process's place among the members.

    settings: text that is the same for every member. per_node: members whose names follow each
    other, so many, are of one node, which is in the run whole or not at all.
    """

    def __init__(self, elastic: Elastic, *, settings: str, per_node: int = 1) -> None:
        if per_node > 1 and not elastic.name.isdecimal():
            raise ValueError(
                f"name={elastic.name!r} with {per_node} ranks a node: expected the rank's number, "
                "which says what node it is of"
            )
        self._elastic = elastic
        self._settings = settings
        self._per_node = per_node
        self._token = uuid.uuid4().hex
        self._store = elastic.connect()
        self._pulse = Pulse(elastic.connect(), self._token, elastic.lease_s)
        self._seen = 0
        self._members: tuple[Member, ...] = ()
        self._announced = 0
        self._has_state = False
        # signs of life of each that claims a name, when all those that do were first seen
        self._beats: dict[tuple[str, ...], int] = {}
        self._round = 0
        self._closed_epoch = 0
        self._left = False
        self._awaited_epoch = 0
        self.epoch: Epoch | None = None

    @property
    def store(self) -> dist.Store:
        """A store for the group of this epoch."""
        return dist.PrefixStore(f"epoch/{self._seen}/group", self._store)

    @property
    def has_state(self) -> bool:
        """Whether this process has been in the run, and what it holds is the run's."""
        return self._has_state

    @property
    def somebody_waits(self) -> bool:
        """Whether somebody waits to come in that can."""
        return self._awaited_epoch == self._seen + 1

    @property
    def has_left(self) -> bool:
        """Whether `close` has been called."""
        return self._left

    def check(self) -> None:
        """Raise MemberLostError once the epoch is over, ConnectionError where the store is lost."""
        if (
            self._left
            or self._closed_epoch == self._seen
            or not self._pulse.lost().isdisjoint(m.token for m in self._members)
        ):
            raise MemberLostError("the epoch is over")

    def decide(self) -> bool:
        """Return once every member has come here with all of a round; whether the epoch ends then.

        Raises MemberLostError where one has not, and none ever will have: the round is void for
        all. Raises ConnectionError where the store is lost.
        """
        if self.epoch is None:
            raise RuntimeError("decide comes within an epoch")
        self._round += 1
        with _naming_a_lost_store():
            decision = self._count_in()
        if decision == _VOID:
            raise MemberLostError("a member is lost that had not received the round")
        self._has_state = True
        return decision == _COUNTS_AND_ENDS

    def _count_in(self) -> str:
        prefix = f"epoch/{self._seen}/round"
        key = f"{prefix}/{self._round}"
        if self._store.add(f"{key}/received", 1) == len(self._members):
            if self._round == 1:
                self._store.set(f"epoch/{self._seen}/begun", "")
            counts = _COUNTS_AND_ENDS if self.somebody_waits else _COUNTS
            decision = self._decided(key, counts)
            # all have read the decision before
            for old in (f"{prefix}/{self._round - 1}", f"{prefix}/{self._round - 1}/received"):
                self._store.delete_key(old)
            return decision
        return self._decision(key)

    def _decision(self, key: str) -> str:
        pause_s = _SHORTEST_PAUSE_S
        while not self._store.check([key]):
            try:
                self.check()
            except MemberLostError:
                return self._decided(key, _VOID)
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)
        return str(self._store.get(key).decode())

    def _decided(self, key: str, value: str) -> str:
        """Return what the first to decide has decided."""
        return str(self._store.compare_set(key, "", value).decode())

    def next_epoch(self) -> Epoch:
        """Return the next epoch that this process is a member of, once there is one.

        Closes the one it is in. A process that the others have gone on without has lost what it
        held. Raises RefusedError where the members do not take this process in, ConnectionError
        where the store is lost.
        """
        with _naming_a_lost_store():
            return self._next_epoch()

    def _next_epoch(self) -> Epoch:
        if self.epoch is not None:
            self._store.set(f"epoch/{self._seen}/closed", "")
            self.epoch = None
        pause_s, tell_at_s = _SHORTEST_PAUSE_S, time.monotonic() + _TELL_AFTER_S
        while True:
            if self._left:
                raise RuntimeError(
                    "this process has left the run: expected no exchange after close"
                )
            found = self._read_members(self._seen + 1)
            if found is None:
                self._announce(self._seen + 1)
                here = self._propose(self._seen + 1)
                if time.monotonic() > tell_at_s:
                    tell_at_s += _TELL_AFTER_S
                    _log.warning(
                        "rank %s waits for others: of %d there are %s",
                        self._elastic.name,
                        max(self._elastic.ranks, len(self._members)),
                        ", ".join(here),
                    )
                time.sleep(pause_s)
                pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)
                continue
            before, self._members = self._members, found
            self._seen += 1
            tokens = [member.token for member in found]
            if self._token in tokens:
                return self._enter(before, tokens.index(self._token))
            if self._has_state:
                _log.warning(
                    "the others have gone on without rank %s, which gave no sign of life for over "
                    "%g s: what it has not sent is lost, and it takes their state",
                    self._elastic.name,
                    self._elastic.lease_s,
                )
            self._has_state = False

    def _enter(self, before: Sequence[Member], rank: int) -> Epoch:
        names = [member.name for member in self._members]
        tokens = {member.token for member in self._members}
        gone = [member for member in before if member.token not in tokens]
        begun = self._had_begun(self._seen - 1)
        # another has never been in the run, and has left nothing
        lost = tuple(member.name for member in gone if member.has_state or begun)
        self._pulse.forget(member.token for member in gone)
        self._round = 0
        number = self._seen

        def ask(store: dist.Store) -> None:
            if self._seen != number:
                return
            # by number: an answer may come when the next epoch has begun
            if store.check([f"epoch/{number}/closed"]):
                self._closed_epoch = number
            waiting = self._announcements(store, number + 1)
            self._awaited_epoch = number + 1 if self._of_whole_nodes(waiting) else 0

        self._pulse.watch(tokens, ask)
        self.epoch = Epoch(number=number, members=self._members, rank=rank, lost=lost)
        if lost:
            _log.warning(
                "rank %s is lost, with what it had not sent; %d go on: %s",
                ", ".join(lost),
                len(names),
                ", ".join(names),
            )
        else:
            _log.info("epoch %d of the run: %s", number, ", ".join(names))
        return self.epoch

    def _announce(self, number: int) -> None:
        if self._announced == number:
            return
        self._announced = number
        place = self._store.add(f"next/{number}/announced", 1)
        mine = Member(self._elastic.name, self._token, self._has_state, self._settings)
        self._store.set(f"next/{number}/{place}", json.dumps(mine))

    def _propose(self, number: int) -> list[str]:
        """Write the next list, where all that are to be in it have come; return who has."""
        if self._store.check([f"refused/{self._token}"]):
            raise RefusedError(self._store.get(f"refused/{self._token}").decode())
        announced = self._announcements(self._store, number)
        self._pulse.watch([member.token for member in (*announced, *self._members)])
        lost = self._pulse.lost()
        here = [member for member in announced if member.token not in lost]
        tokens = {member.token for member in here}
        if not self._is_contested(here) and all(
            old.token in tokens or old.token in lost for old in self._members
        ):
            members = self._accepted(here)
            stateful = any(member.has_state for member in members)
            if stateful or len(members) >= self._elastic.ranks:
                if not stateful and self._had_begun(number - 1):
                    _log.warning("no rank is left that holds the run's state: it begins anew")
                self._decided(
                    f"members/{number}", json.dumps([one._replace(settings="") for one in members])
                )
        return [member.name for member in here]

    def _had_begun(self, number: int) -> bool:
        """Return whether an exchange of this epoch has counted, or may have."""
        return self._store.check([f"epoch/{number}/begun"])

    def _is_contested(self, here: Sequence[Member]) -> bool:
        """Return whether a name is that of several, of which one may be dead by now.

        Another has then taken its place within the lease, after which alone that is known.
        """
        claims: dict[str, list[str]] = {}
        for member in here:
            claims.setdefault(member.name, []).append(member.token)
        contested = False
        for member in here:
            tokens = claims[member.name]
            if len(tokens) > 1:
                beats = self._store.add(beats_key(member.token), 0)
                contested |= beats <= self._beats.setdefault((member.token, *tokens), beats)
        return contested

    def _accepted(self, here: Sequence[Member]) -> list[Member]:
        """Return who of those announced can be in, by rank; tell the others why not."""
        first = next((member for member in here if member.has_state), None)
        by_name: dict[str, Member] = {}
        for member in sorted(here, key=lambda one: not one.has_state):
            if member.name in by_name:
                self._refuse(member, f"another process goes by the name {member.name!r}")
            elif first is not None and member.settings != first.settings:
                self._refuse(member, _difference(first, member))
            else:
                by_name[member.name] = member
        return self._of_whole_nodes(list(by_name.values()))

    def _of_whole_nodes(self, members: Sequence[Member]) -> list[Member]:
        """Return the members by rank, without those of whose node one is not there."""
        ordered = sorted(members, key=lambda one: _place(one.name))
        if self._per_node == 1:
            return ordered
        nodes: dict[int, list[Member]] = {}
        for member in ordered:
            nodes.setdefault(int(member.name) // self._per_node, []).append(member)
        return [one for node in nodes.values() if len(node) == self._per_node for one in node]

    def _refuse(self, member: Member, why: str) -> None:
        self._store.set(f"refused/{member.token}", why)

    def _announcements(self, store: dist.Store, number: int) -> list[Member]:
        count = store.add(f"next/{number}/announced", 0)
        keys = [f"next/{number}/{place}" for place in range(1, count + 1)]
        # a key that is not there yet belongs to somebody who is about to write it
        return [Member(*json.loads(store.get(key))) for key in keys if store.check([key])]

    def _read_members(self, number: int) -> tuple[Member, ...] | None:
        if not self._store.check([f"members/{number}"]):
            return None
        members = json.loads(self._store.get(f"members/{number}"))
        return tuple(Member(*member) for member in members)

    def close(self) -> None:
        """Leave the run; the others see it with their next sign of life."""
        self._left = True
        self._pulse.end()


@contextmanager
def _naming_a_lost_store() -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise store_lost() from error


def _place(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)


def _difference(member: Member, other: Member) -> str:
    for mine, theirs in zip(member.settings.split("\n"), other.settings.split("\n"), strict=False):
        if mine != theirs:
            return (
                f"the run has {mine!r} and rank {other.name} has {theirs!r}: expected the same "
                "settings and the same model"
            )
    return f"rank {other.name} has another number of settings than the run"
