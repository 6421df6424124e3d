"""A slow link between the ranks, emulated: whatever is exchanged waits as long as its bytes take.

Each rank, and a server, has one link of this rate in each direction, as hosts on a switch do; what
is moved while a step is computed is not begun earlier for it. A link is no part of what is trained:
the parameters are those without one.
"""

from __future__ import annotations

import time

from training.settings import LINK_BITS_PER_S, LinkName, Mode


class EmulatedLink:
    """Holds every step back by the bytes that it has exchanged; `held_s` says for how long so far.

    ranks: of the run, which decides how many of the bytes that a rank hands over leave it.
    """

    def __init__(self, name: LinkName, mode: Mode, ranks: int) -> None:
        self._bits_per_s = LINK_BITS_PER_S[name]
        self._mode = mode
        self._ranks = ranks
        self.held_s = 0.0

    def hold_back(self, sent_bytes: int, received_bytes: int) -> None:
        """Wait for the bytes that a rank has sent, and received, since the last call."""
        if self._bits_per_s is None:
            return
        moved = moved_bytes(self._mode, self._ranks, sent_bytes, received_bytes)
        wait_s = 8 * moved / self._bits_per_s
        self.held_s += wait_s
        time.sleep(wait_s)


def moved_bytes(mode: Mode, ranks: int, sent_bytes: float, received_bytes: float) -> float:
    """Return the bytes that the busiest link carries in one direction after the other.

    A ring all-reduce sends each rank's gradient 2 (W - 1) / W times; an all-gather each frame to
    W - 1 ranks; and a server's own link carries what all workers push, and then what all get back.
    """
    if mode == "dense":
        return 2 * (ranks - 1) / ranks * sent_bytes
    if mode == "topq":
        return (ranks - 1) * sent_bytes
    return ranks * (sent_bytes + received_bytes)
