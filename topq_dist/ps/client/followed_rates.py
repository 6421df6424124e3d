"""The rates of the servers' steps, for the residuals of a worker that follow them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

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

    @contextlib.contextmanager
    def at_rates_of(
        self, param_groups: Sequence[Group], elsewhere: Collection[Shard]
    ) -> Iterator[None]:
        """Have the residuals be counted at these groups' rates, but for those of `elsewhere`.

        Where the block, which makes a step's pushes, raises, they are counted as they were before.
        """
        try:
            self.follow(param_groups, elsewhere)
            yield
        except BaseException:
            for shard in self._shards:
                # nothing has been sent: no update has been applied since
                shard.rates.take_back(1.0)
            raise

    def follow(self, param_groups: Sequence[Group], elsewhere: Collection[Shard]) -> None:
        """Have the residuals be counted at these groups' rates, but for those of `elsewhere`."""
        if not self._enabled:
            return
        of_servers = self._groups.of_each_server(param_groups)
        for shard, views, groups in zip(self._shards, *of_servers, strict=True):
            if shard in elsewhere:
                continue
            shard.rates.follow(
                {
                    name: rate
                    for view, group in zip(views, groups, strict=True)
                    for rate in [_rate(view, group)]
                    for name in view.names
                },
                remembers_squares=any(view.remembers_squares for view in views),
            )

    def load(self, saved: Sequence[SavedShard]) -> None:
        """Take up the rates of a worker's state; none that nobody would follow from there."""
        if not self._enabled:
            return
        for shard, one in zip(self._shards, saved, strict=True):
            shard.rates.load_state(one.rates, shard.names)


def _rate(view: GroupView, group: Group) -> float | None:
    """Return the rate of a server's step on sparse pushes; None where none is followed."""
    if not view.keeps_rate:
        return None
    numbers = {name: float(group[name]) for name in view.numbers}
    if view.sums_momentum:
        # ServerGroups has refused what does not add up, but for a rate past all numbers
        with contextlib.suppress(ValueError):
            return float(summed(numbers).get("lr", numbers["lr"]))
        return None
    return numbers["lr"]
