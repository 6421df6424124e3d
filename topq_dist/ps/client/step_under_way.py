"""A worker's step that has been made and is not over: what of it has still to be handed on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from topq_dist.compress.residual import Residuals, ResidualUpdate
from topq_dist.ps.client.ctrl_c import ctrl_c_later
from topq_dist.ps.client.server_client import ServerClient
from topq_dist.ps.protocol.types import NewPush

_Pushes: TypeAlias = list[tuple[ServerClient, NewPush]]
_Updates: TypeAlias = list[tuple[Residuals, ResidualUpdate | None]]


class StepUnderWay:
    """The pushes and residual updates of one step, until the clients and residuals have them.

    A step may be broken off between any two: what is left is handed on when it is finished.
    undecided: some server has still to decide on a push of it.
    """

    def __init__(self, *, undecided: bool = False) -> None:
        self.undecided = undecided
        self._left: tuple[_Pushes, _Updates] = [], []

    @property
    def open(self) -> bool:
        """Whether the step is not over."""
        return self.undecided or any(self._left)

    @property
    def updates(self) -> list[ResidualUpdate]:
        """The updates of residuals that are left."""
        return [update for _, update in self._left[1] if update is not None]

    def make(
        self,
        pushes: Iterable[tuple[ServerClient, NewPush]],
        updates: Iterable[tuple[Residuals, ResidualUpdate | None]],
    ) -> None:
        """Begin a step, which is finished from here on."""
        self._left = list(pushes), list(updates)
        self.undecided = True

    def hand_on_pushes(self) -> None:
        """Have every client hold its push."""
        pushes, _ = self._left
        self.undecided = self.undecided or bool(pushes)
        while pushes:
            client, new = pushes[0]
            if client.pushes.pending is None:
                client.begin(new)
            pushes.pop(0)

    def update_residuals(self) -> None:
        """Have the residuals keep what the pushes leave out."""
        _, updates = self._left
        with ctrl_c_later():
            while updates:
                residuals, update = updates.pop(0)
                residuals.apply(update)
