"""The state directory: one server at a time, and its latest snapshot, whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from topq_dist.ps.state.directory_lock import DirectoryLock, LockLostError
from topq_dist.ps.state.snapshot import Snapshot, packed, unpacked
from topq_dist.ps.state.snapshot_file import (
    Contents,
    StateError,
    read_snapshot_file,
    write_snapshot_file,
)

SNAPSHOT_NAME = "snapshot.safetensors"
PREVIOUS_NAME = "snapshot.previous.safetensors"
_PARTIAL_NAMES = "snapshot.*partial"
_log = logging.getLogger(__name__)


class StateDir:
    """A directory that one server holds its state in, locked until it is closed.

    Makes it where it is missing, and removes what a killed server had not finished writing.
    Raises StateError where it cannot, or where another server has it.

    The snapshot before the latest stays beside it, where the file system knows hard links.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # names of its own: a server that has lost the directory may still be writing
        own = f"{secrets.token_hex(4)}.partial"
        self._partial = self.path / f"{SNAPSHOT_NAME}.{own}"
        self._spare = self.path / f"{PREVIOUS_NAME}.{own}"
        self._saving = threading.Lock()
        self._saved_version = -1
        # of the latest snapshot, as this server has found or left it
        self._saved_stamp: tuple[int, int] | None = None
        try:
            if not self.path.exists():
                self.path.mkdir(mode=0o700, parents=True)
                _sync_directory(self.path.parent)
            self._lock = DirectoryLock(self.path)
        except OSError as error:
            raise StateError(f"state directory {self.path}: {error}") from error
        try:
            for partial in self.path.glob(_PARTIAL_NAMES):
                _log.info("removing %s, which was not finished", partial)
                partial.unlink(missing_ok=True)
            self._saved_stamp = _stamp(self.snapshot_path)
        except BaseException as error:
            self._lock.close()
            if isinstance(error, OSError):
                raise StateError(f"state directory {self.path}: {error}") from error
            raise

    @property
    def snapshot_path(self) -> Path:
        """The path of the latest snapshot, if there is one."""
        return self.path / SNAPSHOT_NAME

    @property
    def previous_path(self) -> Path:
        """The path of the snapshot before the latest, if there is one."""
        return self.path / PREVIOUS_NAME

    @property
    def saved_bytes(self) -> int:
        """Bytes of the latest snapshot's file; 0 without one."""
        return self._saved_stamp[0] if self._saved_stamp else 0

    def unusable(self, why: Exception) -> StateError:
        """Return the error of a latest snapshot that cannot be gone on from."""
        said = str(why)
        if not isinstance(why, StateError):
            said = f"{self.snapshot_path} is no snapshot: {why!r}"
        remedy = ""
        if self.previous_path.exists():
            remedy = (
                f"; the one before it is {self.previous_path.name}: in its place, with nothing"
                " else changed, a server goes on from there, and what workers do not hold any more"
                " is lost"
            )
        return StateError(said + remedy)

    def load(self) -> Snapshot | None:
        """Return the latest snapshot, or None where none was ever saved.

        Its tensors may be backed by the file: copy what is to be kept. Raises StateError, naming
        the file, where it is damaged in any bit, of another format, or cannot be read.
        """
        try:
            contents = read_snapshot_file(self.snapshot_path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"{self.snapshot_path} cannot be read: {error}") from error
        except StateError as error:
            raise self.unusable(error) from error
        try:
            snapshot = unpacked(contents)
        except Exception as error:  # a file with a fitting digest may hold anything
            raise self.unusable(error) from error
        self._saved_version = snapshot.point.version
        self._saved_stamp = _stamp(self.snapshot_path)
        return snapshot

    def save(self, snapshot: Snapshot) -> None:
        """Put `snapshot` in place of the latest; durable once this returns.

        Nothing of it may change meanwhile; nothing is copied. Whatever happens, and whenever the
        process or the machine dies, the latest snapshot is wholly the old or wholly the new one.
        Raises StateError where it could not be written, LockLostError where another server has the
        directory now, and ValueError for one that is older than the latest or holds what cannot be
        saved.
        """
        with self._saving:
            if self._lock.closed:
                raise ValueError(f"state directory {self.path} is closed: expected an open one")
            version = snapshot.point.version
            if version < self._saved_version:
                raise ValueError(f"version={version}: expected {self._saved_version} or later")
            contents = packed(snapshot)
            try:
                # a new file each time: after a failed fsync the old one's pages are not to trust
                self._partial.unlink(missing_ok=True)
                _write_durably(self._partial, contents)
                self._check_ours()
                if version > self._saved_version >= 0:
                    self._keep_previous()
                _rename(self._partial, self.snapshot_path)
                self._saved_stamp = _stamp(self.snapshot_path)
                _sync_directory(self.path)
            except OSError as error:
                raise StateError(f"{self.snapshot_path} was not saved: {error}") from error
            finally:
                with contextlib.suppress(OSError):  # its space may be what is missing
                    self._partial.unlink(missing_ok=True)
            self._saved_version = version

    def close(self) -> None:
        """Let another server have the directory."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_ours(self) -> None:
        """Raise LockLostError where another server has, or has had, the directory meanwhile."""
        self._lock.check()
        if _stamp(self.snapshot_path) not in (None, self._saved_stamp):
            raise LockLostError(
                f"{self.snapshot_path} was written by somebody else: expected nobody but this "
                "server to do so while it runs"
            )

    def _keep_previous(self) -> None:
        """Give the latest snapshot a second name, which stays when it is replaced."""
        try:
            self._spare.unlink(missing_ok=True)
            os.link(self.snapshot_path, self._spare)
            self._spare.replace(self.previous_path)
        except OSError as error:
            _log.debug("the snapshot before the latest is not kept: %s", error)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from another of its name; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _write_durably(path: Path, contents: Mapping[str, Contents]) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        write_snapshot_file(file, contents)
        os.fsync(file)
    finally:
        os.close(file)


def _rename(partial: Path, path: Path) -> None:
    partial.replace(path)


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
