"""The lock of a state directory: one server at a time, even where its file is removed."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from pathlib import Path

from topq_dist.ps.state.snapshot_file import StateError

_log = logging.getLogger(__name__)
_NAME = "lock"


class LockLostError(StateError):
    """Another server has taken the state directory over: this one may not write there any more."""


class DirectoryLock:
    """Holds the lock of a directory until it is closed, or its process ends.

    Raises StateError where another process has it, saying which, and OSError.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = _acquire(directory)

    @property
    def closed(self) -> bool:
        """Whether it was let go."""
        return self._file < 0

    def check(self) -> None:
        """Raise LockLostError where another process has the lock of this directory now.

        A file that was removed is made again, where nobody came in between.
        """
        path = self._directory / _NAME
        if path.exists() and os.path.samestat(os.fstat(self._file), path.stat()):
            return
        _log.warning("the lock of %s was removed: taking it again", self._directory)
        try:
            file = _acquire(self._directory)
        except StateError as error:
            raise LockLostError(f"{error}; its lock file was removed meanwhile") from error
        self.close()
        self._file = file

    def close(self) -> None:
        """Let another process have it."""
        if not self.closed:
            os.close(self._file)
            self._file = -1


def _acquire(directory: Path) -> int:
    lock = os.open(directory / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(lock, 200, 0).decode(errors="replace") or "another process"
        os.close(lock)
        raise StateError(
            f"state directory {directory} is in use by {holder}: stop it, or give this server "
            "another one"
        ) from error
    except OSError:
        os.close(lock)
        raise
    return lock
