"""The yield of a worker's step at one server."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.model.update import apply_update
from topq_dist.ps.protocol.errors import DamagedError
from topq_dist.ps.protocol.types import PushRecord, Update, UpdateKind


@dataclass(kw_only=True)
class Outcome:
    """The yield of a step.

    changed: where the model has changed, update by update: ascending indices for each vector. None:
        anywhere.
    taken_back: pushes that the server did not take, whose values go back into the residual.
    refused: one of them was, maybe for its rate, which is then none that anything was applied at.
    forked: this worker was started again from before pushes of its own that the server holds, and
        has come another way since: its residual is in them, as far as anybody can tell.
    overflowed: a push was given up that would not leave the model finite; what is left of its
        gradient, in the residual, would not either.
    """

    changed: list[list[Tensor]] | None = field(default_factory=list)
    taken_back: list[PushRecord] = field(default_factory=list)
    refused: bool = False
    forked: bool = False
    overflowed: bool = False
    sent_bytes: int = 0
    received_bytes: int = 0

    def apply(self, update: Update, model: FlatModel, version: int, address: str) -> None:
        """Apply an update to a model of `version`; raises DamagedError for another version's."""
        if update.kind is not UpdateKind.FULL and update.point.version != version + 1:
            raise DamagedError(
                f"parameter server {address}: an update to version {update.point.version}: "
                f"expected {version + 1}"
            )
        changed = apply_update(model, update)
        if changed is None or self.changed is None:
            self.changed = None
        else:
            self.changed.append(changed)
