"""The time and the tries that a server is given."""

from __future__ import annotations

import time

from topq_dist.compress.codec.frame import FrameError
from topq_dist.ps.client.call_errors import DoubtfulError, UnreachedError
from topq_dist.ps.client.connection import Connection
from topq_dist.ps.protocol.errors import DamagedError, ServerLostError

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.5
# how often a call may be damaged on its way, before it is something else
_MOST_DOUBTS = 3
_LOOK_EVERY_S = 1.0


class RetryDeadline:
    """The time that a server may still be silent; a sign of life starts it anew.

    at_first: nothing has ever been heard of it, so that whatever keeps it from taking this client
        (no TLS at one end, a certificate) is an error at once. Later, files may be changing.
    """

    def __init__(self, connection: Connection, timeout_s: float, *, at_first: bool = False) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._at_first = at_first
        self._pause_s = _FIRST_PAUSE_S
        self._last_error: Exception | None = None
        self._last_sign_s = self._last_look_s = time.monotonic()
        self._reason: str | None = None
        self._doubts = 0

    def extend(self) -> None:
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
        # whoever gives a reason, as that it is starting, takes this client
        unreached = self._at_first and isinstance(error, UnreachedError)
        if unreached and time.monotonic() >= self._last_look_s + _LOOK_EVERY_S:
            self._look()
        time.sleep(min(self._pause_s, self.left_s()))
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def doubt(self, error: DamagedError | FrameError | DoubtfulError) -> None:
        """Have a call tried again that may have been damaged on its way, or its answer.

        Raises the error that stays where that has happened several times.
        """
        self._doubts += 1
        if self._doubts > _MOST_DOUBTS:
            if isinstance(error, FrameError):
                raise DamagedError(f"parameter server {self._connection.address}: {error}")
            raise error.final if isinstance(error, DoubtfulError) else error
        self.pause(error)

    def _look(self) -> None:
        """Raise ServerLostError where the server does not take this client, twice in a row."""
        before, self._reason = self._reason, self._connection.lasting_reason()
        self._last_look_s = time.monotonic()
        if self._reason is not None and self._reason == before:
            raise ServerLostError(
                f"parameter server {self._connection.address}: {self._reason}"
            ) from self._last_error
