"""What was sent, what that saved, and what was waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Totals of one rank since its state was made, those before a resume included.

    steps: synchronised backward passes, or steps through a parameter server.
    sent_bytes: handed to collectives by this rank, headers and padding included; or payloads that a
        parameter server took.
    received_bytes: payloads that came from a parameter server; with collectives it stays 0.
    wire_bytes: what those collectives make this rank put on its link, forwarding included: an
        all-gather among W ranks W - 1 times what is handed to it, a ring all-reduce 2 (W - 1) / W
        times.
    dense_bytes: what plain DDP would have handed to its all-reduce in the same steps.
    select_s: seconds in compensation, selection and encoding.
    wait_s: seconds blocked on peers and links.
    """

    steps: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    wire_bytes: int = 0
    dense_bytes: int = 0
    select_s: float = 0.0
    wait_s: float = 0.0

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than dense were sent; nan before the first step."""
        return self.dense_bytes / self.sent_bytes if self.sent_bytes else float("nan")


class Meter:
    """Adds up Stats."""

    def __init__(self, stats: Stats | None = None) -> None:
        self.stats = stats or Stats()

    def add(self, **amounts: float) -> None:
        """Add to the named fields of the totals."""
        totals = {name: getattr(self.stats, name) + amount for name, amount in amounts.items()}
        self.stats = replace(self.stats, **totals)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent in the block to the field `name`."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(**{name: time.perf_counter() - started_s})
