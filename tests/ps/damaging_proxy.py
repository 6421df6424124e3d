"""A TCP proxy that damages bytes on their way, as a bad cable or a bad router does."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from topq_dist.ps.security.address import Address


class DamagingProxy:
    """Flips a bit about once in `every_bytes`, while `active`; both ways, where `seed` says.

    spares: bytes at both ends of what is sent at once, where HTTP/2's own headers lie.
    """

    def __init__(self, target: Address, *, every_bytes: int, seed: int, spares: int = 0) -> None:
        self._target = target
        self._every_bytes = every_bytes
        self._spares = spares
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._left = self._draw()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self.active = False
        self.flips = 0
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _draw(self) -> int:
        return self._random.randrange(2 * self._every_bytes)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = self._target.connect(10)
                far.settimeout(None)
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 16):
                sink.sendall(self._damaged(bytearray(chunk)))
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _damaged(self, chunk: bytearray) -> bytearray:
        with self._lock:
            start = 0
            while self.active and start + self._left < len(chunk):
                start += self._left
                if self._spares <= start <= len(chunk) - self._spares - 1:
                    chunk[start] ^= 1 << self._random.randrange(8)
                    self.flips += 1
                self._left = self._draw() + 1
            if self.active:
                self._left -= len(chunk) - start
        return chunk

    def close(self) -> None:
        self._listener.close()
        for end in self._ends:
            end.close()


@contextmanager
def damaging(
    target: Address, *, every_bytes: int, seed: int, spares: int = 0
) -> Iterator[DamagingProxy]:
    proxy = DamagingProxy(target, every_bytes=every_bytes, seed=seed, spares=spares)
    try:
        yield proxy
    finally:
        proxy.close()
