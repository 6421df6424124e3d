"""What was sent, what that saved, and what was waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


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
    """Adds up Stats, and beside them what is counted since the process began and is not saved.

    encode_s: of Stats.select_s, the seconds in quantizing and encoding. decode_s: seconds in
    decoding, averaging and updating residuals. void_steps: those in which a rank's gradient held
    NaN or infinity, so that nothing was sent or nothing delivered.
    """

    def __init__(self, stats: Stats | None = None) -> None:
        self.stats = stats or Stats()
        self.decode_s = 0.0
        self.void_steps = 0

    @property
    def stats(self) -> Stats:
        """The totals; to set them goes on from those of another process."""
        return Stats(**self._totals)

    @stats.setter
    def stats(self, stats: Stats) -> None:
        self._totals = dict(vars(stats))
        self._before_s = stats.select_s
        self.encode_s = 0.0

    @property
    def selecting_s(self) -> float:
        """Seconds in compensation and selection alone, since this process began."""
        return max(0.0, float(self._totals["select_s"]) - self._before_s - self.encode_s)

    def add(self, **amounts: float) -> None:
        """Add to the named fields of the totals."""
        for name, amount in amounts.items():
            self._totals[name] += amount

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent in the block to the field `name`."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(**{name: time.perf_counter() - started_s})
