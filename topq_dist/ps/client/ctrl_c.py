"""Ctrl-C, kept out of what must be done whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ctrl_c_later() -> Iterator[None]:
    """Have Ctrl-C raise at the end of the block, and not within it.

    On another thread than the main one nothing changes, since it raises there alone; nor where
    somebody else than Python handles it.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *signalled: came.append(signalled))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came and callable(before):
            before(*came[0])
        elif came and before == signal.SIG_DFL:
            signal.raise_signal(signal.SIGINT)
