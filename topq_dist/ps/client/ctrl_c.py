"""Ctrl-C, kept out of what must be done whole."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ctrl_c_later() -> Iterator[None]:
    """Have Ctrl-C raise at the end of the block, and not within it.

    On another thread than the main one nothing changes, since it raises there alone.
    """
    came: list[tuple[int, FrameType | None]] = []
    try:
        before = signal.signal(signal.SIGINT, lambda *signalled: came.append(signalled))
    except ValueError:
        # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if came and callable(before):
            before(*came[0])
