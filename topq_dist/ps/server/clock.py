"""The time that leases and limits go by: it stands still while this process does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# the call watchdog asks twice as often; a thread that gets no turn for so long is a pause as well
LONGEST_GAP_S = 1.0
# workers find their connections broken then, and may take until their next renewal to come back
LONG_PAUSE_S = 10.0


class RunningClock:
    """Seconds for which this process has run, from anywhere on.

    A process that is stopped, in a paused container or a virtual machine on the move, hears nobody:
    its own silence is not to count as that of workers. Asked at least every LONGEST_GAP_S, it
    takes whatever is longer between two questions for such a pause and leaves it out.

    source: seconds that go on meanwhile.
    """

    def __init__(self, source: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._asked_s = source()
        self._paused_s = 0.0
        # called after a long pause, by whichever thread notices it first
        self.after_long_pause: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        """Return the time."""
        with self._lock:
            asked_s = self._source()
            gap_s = asked_s - self._asked_s
            self._asked_s = asked_s
            if gap_s > LONGEST_GAP_S:
                self._paused_s += gap_s
            now_s = asked_s - self._paused_s
        if gap_s > LONG_PAUSE_S:
            self.after_long_pause()
        return now_s
