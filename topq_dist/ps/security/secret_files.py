"""Files that hold secrets: who may read them, and that a change of them is noticed."""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

_logger = logging.getLogger(__name__)
_MAX_BYTES = 1 << 20
# A file changed twice within a tick of the file system's clock looks unchanged after the second:
# a file that young is read again.
_YOUNG_S = 2.0

Value = TypeVar("Value")


def read_file(name: str, path: Path, *, secret: bool = False) -> bytes:
    """Return the content of a file of at most 1 MiB.

    secret: nobody but its owner may write it, nobody but owner and group read it. Raises
    ValueError, naming the parameter `name`.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{name}={str(path)!r}: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode) or len(content) > _MAX_BYTES:
        raise ValueError(f"{name}={str(path)!r}: expected a regular file of at most 1 MiB")
    if secret and os.name == "posix" and status.st_mode & 0o037:
        raise ValueError(
            f"{name}={str(path)!r}: its mode {stat.S_IMODE(status.st_mode):04o} lets others read or"
            " write it: expected 0600, or 0640 at most"
        )
    return content


class Watched(Generic[Value]):
    """The value that `load` made of files, made again once they have changed.

    Where the new files are no good, the last good value stays and a warning is logged. `load` is
    called at once, and what it raises goes through.
    """

    def __init__(self, paths: tuple[Path, ...], load: Callable[[], Value]) -> None:
        self._paths = paths
        self._load = load
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._value = load()
        self._warned = ""

    def current(self) -> Value:
        """Return the value of the files as they are now."""
        with self._lock:
            seen = self._signature()
            if seen is None or seen != self._seen:
                self._seen = seen
                try:
                    self._value = self._load()
                    self._warned = ""
                except ValueError as error:
                    if str(error) != self._warned:
                        _logger.warning("%s: going on with what was there before", error)
                    self._warned = str(error)
            return self._value

    def _signature(self) -> tuple[tuple[int, ...], ...] | None:
        signature: list[tuple[int, ...]] = []
        for path in self._paths:
            try:
                status = path.stat()
            except OSError:
                signature.append((0,))
                continue
            if abs(time.time() - status.st_ctime) < _YOUNG_S:
                return None
            signature.append(
                (status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size)
            )
        return tuple(signature)
