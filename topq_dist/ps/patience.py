"""How long a server may be silent before it counts as lost."""

from __future__ import annotations

import time

from topq_dist.ps.connection import Connection

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.5


class Patience:
    """How long a server may still be silent; a sign of life starts the time anew."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._pause_s = _FIRST_PAUSE_S
        self._last_error: Exception | None = None
        self._last_sign_s = time.monotonic()

    def sign(self) -> None:
        """Note a sign of life."""
        self._last_sign_s = time.monotonic()
        self._pause_s = _FIRST_PAUSE_S

    def left_s(self) -> float:
        """Return the seconds left; raises ServerLostError when there are none."""
        left_s = self._last_sign_s + self._timeout_s - time.monotonic()
        if left_s <= 0:
            raise self._connection.lost(self._timeout_s, self._last_error) from None
        return left_s

    def pause(self, error: Exception) -> None:
        """Wait a little before the call that failed with `error` is tried again."""
        self._last_error = error
        time.sleep(min(self._pause_s, self.left_s()))
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
