"""The rates of the servers' steps, for the residuals of a worker that follow them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence

from topq_dist.optim.momentum_rules import summed
from topq_dist.ps.client.param_groups import Group, ServerGroups
from topq_dist.ps.client.shard import Shard
from topq_dist.ps.client.worker_state import SavedShard
from topq_dist.ps.protocol.types import GroupView


class FollowedRates:
    """Has the residuals of each shard follow the rates of its server's steps.

    enabled: False leaves all of them as they are. A server says which groups' are followed.
    """

    def __init__(self, shards: Sequence[Shard], groups: ServerGroups, *, enabled: bool) -> None:
        self._shards = shards
        self._groups = groups
        self._enabled = enabled
        self._rates: list[list[float | None]] = [[] for _ in shards]

    def follow(self, param_groups: Sequence[Group], elsewhere: Collection[Shard]) -> None:
        """Have the residuals be counted at these groups' rates, but for those of `elsewhere`."""
        if not self._enabled:
            return
        for place, (shard, views, groups) in enumerate(
            zip(self._shards, *self._groups.of_each_server(param_groups), strict=True)
        ):
            rates = [_rate(view, group) for view, group in zip(views, groups, strict=True)]
            if rates != self._rates[place]:
                self._rates[place] = rates
                named = zip(views, rates, strict=True)
                shard.rates.change(
                    {name: rate for view, rate in named for name in view.names},
                    divides_by_mean_square=any(view.divides_by_mean_square for view in views),
                )
            if shard not in elsewhere:
                for vector in shard.spec.vectors:
                    shard.rates.follow(vector.layout.names, vector.dtype)

    def load(self, saved: Sequence[SavedShard]) -> None:
        """Take up the rates of a worker's state; none that nobody would follow from there."""
        if not self._enabled:
            return
        for shard, one in zip(self._shards, saved, strict=True):
            shard.rates.load_state(one.rates, shard.names)
        self._rates = [[] for _ in self._shards]


def _rate(view: GroupView, group: Group) -> float | None:
    """Return the rate of a server's step on sparse pushes; None where none is followed."""
    if not view.keeps_rate:
        return None
    numbers = {name: float(group[name]) for name in view.numbers}
    if view.sums_momentum:
        # one that does not add up is refused by the server
        with contextlib.suppress(ValueError):
            return float(summed(numbers).get("lr", numbers["lr"]))
        return None
    return numbers["lr"]
