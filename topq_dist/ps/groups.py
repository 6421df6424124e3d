"""The servers' parameter groups, as a worker's param_groups show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from topq_dist.ps.protocol import GroupView


class ServerGroups:
    """What the groups of each server were when this worker joined.

    told_lr: the lr of each group then. sends_lr: whether this worker has ever changed one, and so
    sends all of them.
    """

    def __init__(self, views: Sequence[Sequence[GroupView]]) -> None:
        self._views = views
        self.told_lr = [view.numbers["lr"] for view in self._all()]
        self.sends_lr = False

    def _all(self) -> list[GroupView]:
        return [view for views in self._views for view in views]

    def param_groups(self, named: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Return torch's parameter groups, those of one server behind those of the other."""
        return [
            {"params": [named[name] for name in view.names], **_ordered(view.numbers)}
            for view in self._all()
        ]

    def rates(self, param_groups: Sequence[Mapping[str, Any]]) -> list[tuple[float, ...]]:
        """Return the lr of each group to send to each server; nothing while none was changed.

        Raises ValueError for an lr that is no finite number of at least zero, or where another
        number of a group is not the server's.
        """
        rates = []
        for place, (group, view) in enumerate(zip(param_groups, self._all(), strict=True)):
            for name, number in view.numbers.items():
                if name != "lr" and float(group[name]) != number:
                    raise ValueError(
                        f"{name}={group[name]!r} in param_groups[{place}]: expected {number}, as "
                        "the server has it; of its numbers a worker can change lr alone"
                    )
            lr = float(group["lr"])
            if not math.isfinite(lr) or lr < 0:
                raise ValueError(
                    f"lr={group['lr']!r} in param_groups[{place}]: expected a finite number of at "
                    "least 0"
                )
            self.sends_lr = self.sends_lr or lr != self.told_lr[place]
            rates.append(lr)
        if not self.sends_lr:
            return [() for _ in self._views]
        left = iter(rates)
        return [tuple(next(left) for _ in views) for views in self._views]


def _ordered(numbers: Mapping[str, float]) -> dict[str, float]:
    # a map on the wire has no order
    return {"lr": numbers["lr"]} | {name: numbers[name] for name in sorted(numbers)}
