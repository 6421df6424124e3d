"""A gloo group of an epoch, in which nobody waits for a member that is lost.

Gloo tells those who talk to a process that has ended, at once; who waits for somebody that has
gone away for that reason, or for a machine without power, it leaves to a timeout.
"""

from __future__ import annotations

import atexit
import datetime as dt
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from topq_dist.elastic.errors import MemberLostError

_CONNECT = dt.timedelta(seconds=10)
# leases end waiting: this is for a member that gives signs of life and does not come
_LONGEST_WAIT = dt.timedelta(minutes=30)
_GLANCE = dt.timedelta(milliseconds=100)
T = TypeVar("T")


class WatchedGroup(dist.ProcessGroup):
    """Collectives among the members of an epoch, which raise MemberLostError where one is lost.

    check: raises MemberLostError once the epoch is over; called every tenth of a second while a
    collective is waited for. There are all-gathers, broadcasts, all-to-alls and reductions, and
    none point to point. Making one is a collective; raises MemberLostError where a member does not
    come.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, name: str, check: Callable[[], None]
    ) -> None:
        self._start(store, list(range(size)), rank, name, check)

    def _start(
        self,
        store: dist.Store,
        ranks: Sequence[int],
        rank: int,
        name: str,
        check: Callable[[], None],
    ) -> None:
        super().__init__(rank, len(ranks))  # type: ignore[call-arg]
        self._check = check
        self._inner: list[WatchedGroup] = []
        self._failed = False
        self._under_way: list[dist.Work] = []
        self._store = store
        self._name = name
        try:
            self._gloo: Any = dist.ProcessGroupGloo(store, rank, len(ranks), _CONNECT)
        except RuntimeError as error:
            raise MemberLostError(f"a member did not connect: {error}") from error
        # torch's collectives look up what new_group would have entered
        world = distributed_c10d._world
        world.pg_map[self] = ("gloo", store)
        world.pg_names[self] = name  # type: ignore[assignment]
        world.pg_group_ranks[self] = {one: place for place, one in enumerate(ranks)}
        atexit.register(self.leave)

    @property
    def has_failed(self) -> bool:
        """Whether a collective has, of this group or one among its ranks.

        Torch's functions, as they log a MemberLostError, may raise another error in its place.
        """
        return self._failed or any(group.has_failed for group in self._inner)

    def among(self, ranks: Sequence[int]) -> WatchedGroup:
        """Return a group of these ranks of this one, left with it; called by its members alone."""
        name = "-".join(map(str, ranks))
        group = WatchedGroup.__new__(WatchedGroup)
        store = dist.PrefixStore(f"among/{name}", self._store)
        place = list(ranks).index(self.rank())
        group._start(store, ranks, place, f"{self._name}/{name}", self._check)
        self._inner.append(group)
        return group

    def leave(self) -> None:
        """Forget the group; what is under way in it ends when it may."""
        for group in self._inner:
            group.leave()
        world = distributed_c10d._world
        world.pg_map.pop(self, None)
        world.pg_names.pop(self, None)
        world.pg_group_ranks.pop(self, None)
        atexit.unregister(self.leave)
        gloo, self._gloo = self._gloo, _Over()
        under_way = [work for work in self._under_way if not work.is_completed()]
        if under_way:
            # destroying a group waits for its work, and has Python wait with it
            threading.Thread(target=_wait_out, args=(gloo, under_way), daemon=True).start()

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return "gloo"

    def allgather(self, *arguments: Any, **named: Any) -> Any:
        return self._launch(self._gloo.allgather, arguments, named)

    def allreduce(self, *arguments: Any, **named: Any) -> Any:
        return self._launch(self._gloo.allreduce, arguments, named)

    def broadcast(self, *arguments: Any, **named: Any) -> Any:
        return self._launch(self._gloo.broadcast, arguments, named)

    def reduce(self, *arguments: Any, **named: Any) -> Any:
        return self._launch(self._gloo.reduce, arguments, named)

    def alltoall_base(self, *arguments: Any, **named: Any) -> Any:
        return self._launch(self._gloo.alltoall_base, arguments, named)

    def all_to_all_single(self, *arguments: Any, **named: Any) -> Any:
        # what newer versions of torch call it
        return self.alltoall_base(*arguments, **named)

    def _launch(
        self, collective: Callable[..., Any], arguments: Sequence[Any], named: Mapping[str, Any]
    ) -> WatchedWork:
        self._failing(self._check)
        # torch's functions give their options last
        if arguments and hasattr(arguments[-1], "timeout"):
            arguments[-1].timeout = _LONGEST_WAIT
        self._under_way = [work for work in self._under_way if not work.is_completed()]
        work = self._failing(partial(collective, *arguments, **named))
        self._under_way.append(work)
        return WatchedWork(work, self._check, self._failing)

    def _failing(self, action: Callable[[], T]) -> T:
        """Do what fails where a member is lost."""
        try:
            return action()
        except MemberLostError:
            self._failed = True
            raise
        except RuntimeError as error:
            self._failed = True
            raise MemberLostError(f"a collective failed: {error}") from error


class WatchedWork:
    """A collective under way."""

    def __init__(
        self,
        work: dist.Work,
        check: Callable[[], None],
        failing: Callable[[Callable[[], bool]], bool],
    ) -> None:
        self._work = work
        self._check = check
        self._failing = failing

    def is_completed(self) -> bool:
        """Return whether it is over, whatever has come of it."""
        return self._work.is_completed()

    def wait(self, _: dt.timedelta | None = None) -> bool:
        """Wait; raise MemberLostError where it failed, or the epoch is over before it is."""
        return self._failing(self._wait)

    def _wait(self) -> bool:
        while not self._work.is_completed():
            try:
                return self._work.wait(_GLANCE)
            except RuntimeError:
                # not yet, or with the error that waiting once more tells
                if not self._work.is_completed():
                    self._check()
        return self._work.wait()


class _Over:
    """A group that has been left."""

    def __getattr__(self, name: str) -> Any:
        raise MemberLostError(f"{name} in a group that has been left")


def _wait_out(_gloo: Any, under_way: Sequence[dist.Work]) -> None:
    for work in under_way:
        try:
            work.wait(_LONGEST_WAIT)
        except RuntimeError:
            continue
