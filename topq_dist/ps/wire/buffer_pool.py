"""Memory for what comes over the wire, kept: fresh pages cost several times what filling them does.

Gradients of a size come round after round, and the system clears each page before it gives it out.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

# below it malloc keeps memory by itself
_LEAST_BYTES = 1 << 20
# of a size's leading bits: buffers are an eighth longer than what is asked for at most
_LEADING_BITS = 4

Bytes = npt.NDArray[np.uint8]


class BufferPool:
    """Lends buffers, and takes each back once nothing refers to it or to a view of it any more.

    idle_limit_s: what lies idle for longer is freed, when next somebody borrows.
    """

    def __init__(self, *, idle_limit_s: float = 60.0) -> None:
        self._idle_limit_s = idle_limit_s
        self._trimmed_s = time.monotonic()
        # a buffer may come back in the middle of anything its thread does, this class included
        self._lock = threading.RLock()
        self._idle: dict[int, list[Bytes]] = {}
        self._least_idle: dict[int, int] = {}

    @property
    def idle_bytes(self) -> int:
        """Bytes of the buffers that nobody has."""
        with self._lock:
            return sum(size * len(buffers) for size, buffers in self._idle.items())

    def acquire(self, size: int) -> Bytes:
        """Return `size` bytes, (size,) of uint8, of any content; raises MemoryError."""
        if size < _LEAST_BYTES:
            return np.empty(size, dtype=np.uint8)
        size_kept = _rounded_up(size)
        with self._lock:
            if time.monotonic() >= self._trimmed_s + self._idle_limit_s:
                self._trim()
            idle = self._idle.get(size_kept)
            buffer = idle.pop() if idle else None
            if idle is not None:
                self._least_idle[size_kept] = min(self._least_idle[size_kept], len(idle))
        if buffer is None:
            buffer = np.empty(size_kept, dtype=np.uint8)
        return np.asarray(_Loan(buffer, self))[:size]

    def release(self, buffer: Bytes) -> None:
        """Keep a buffer for later."""
        with self._lock:
            self._idle.setdefault(buffer.size, []).append(buffer)
            self._least_idle.setdefault(buffer.size, 0)

    def _trim(self) -> None:
        """Free as many buffers of each size as have lain idle since the last call."""
        self._trimmed_s = time.monotonic()
        for size, idle in list(self._idle.items()):
            del idle[: self._least_idle[size]]
            self._least_idle[size] = len(idle)
            if not idle:
                del self._idle[size], self._least_idle[size]


class _Loan:
    """The base of an array of a lent buffer: its end is the loan's."""

    def __init__(self, buffer: Bytes, pool: BufferPool) -> None:
        self._buffer = buffer
        self._pool = pool

    @property
    def __array_interface__(self) -> dict[str, Any]:
        interface: dict[str, Any] = self._buffer.__array_interface__
        return interface

    def __del__(self) -> None:
        self._pool.release(self._buffer)


def _rounded_up(size: int) -> int:
    step = 1 << max(0, size.bit_length() - _LEADING_BITS)
    return -(-size // step) * step
