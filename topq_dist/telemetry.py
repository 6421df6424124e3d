"""What was sent, what that saved, and what was waited for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Totals of one rank since its state was made or loaded.

    steps: synchronised backward passes.
    sent_bytes: handed to collectives by this rank, headers and padding included.
    dense_bytes: what plain DDP would have handed to its all-reduce in the same steps.
    select_s: seconds in compensation, selection and encoding.
    wait_s: seconds blocked on peers and links.
    """

    steps: int = 0
    sent_bytes: int = 0
    dense_bytes: int = 0
    select_s: float = 0.0
    wait_s: float = 0.0

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than dense were sent; nan before the first step."""
        return self.dense_bytes / self.sent_bytes if self.sent_bytes else float("nan")
