"""A token for each worker: who may speak in its name."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from topq_dist.ps.protocol.errors import InvalidError, UnauthenticatedError, WrongTokenError
from topq_dist.ps.protocol.types import check_worker_name
from topq_dist.ps.security.secret_files import Watched, read_file

_HEADER = "authorization"
_SCHEME = "bearer"
_TOKEN = re.compile(r"[!-~]{16,512}")
_FORM = "16 to 512 visible ASCII characters"


class Authenticator:
    """Checks the token that comes with a call against a file of "worker token" lines.

    Empty lines and lines that start with # do not count. A worker may have several tokens (the new
    one and the old, while workers change over); a token has one worker. The file is read again when
    it changes; where the new one is no good, the last good one stays. Raises ValueError for a file
    that cannot be read, that others may read, or that holds something else.
    """

    def __init__(self, tokens: Path) -> None:
        self._known = Watched((tokens,), lambda: _read_tokens(tokens))

    def check(self, metadata: Iterable[tuple[str, str | bytes]], worker: str | None) -> str:
        """Return whose token `metadata` of a call holds: that of `worker`, or of any for None.

        Raises UnauthenticatedError for no token or an unknown one, WrongTokenError for another
        worker's.
        """
        given = [value for key, value in metadata if key.lower() == _HEADER]
        text = given[0] if len(given) == 1 and isinstance(given[0], str) else ""
        scheme, _, token = text.partition(" ")
        if scheme.lower() != _SCHEME or not token:
            raise UnauthenticatedError(
                "no token: this server expects 'authorization: Bearer TOKEN' in the metadata of"
                " each call"
            )
        holder = None
        digest = _digest(token)
        for known, name in self._known.current():
            if hmac.compare_digest(known, digest):
                holder = name
        if holder is None:
            raise UnauthenticatedError("unknown token: the server's tokens file does not hold it")
        if worker is not None and not hmac.compare_digest(holder.encode(), worker.encode()):
            raise WrongTokenError(f"worker={worker!r}: the token that was given is of {holder!r}")
        return holder


def check_token(token: str) -> str:
    """Return `token` where it can be one; raises ValueError, which does not repeat it."""
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise ValueError(f"token: expected {_FORM}")
    return token


def read_token(path: str | Path) -> str:
    """Return the one token in a worker's own file, which others may not read.

    Raises ValueError for a file that is not there, that others may read, or that holds something
    else; the message does not repeat it.
    """
    path = Path(path)
    text = _text("token_file", path, read_file("token_file", path, secret=True)).strip()
    if not _TOKEN.fullmatch(text):
        raise ValueError(f"token_file={str(path)!r}: expected {_FORM} and nothing else")
    return text


def token_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a call that brings `token`."""
    return ((_HEADER, f"Bearer {check_token(token)}"),)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _text(name: str, path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}={str(path)!r}: expected text in UTF-8") from error


def _read_tokens(path: Path) -> tuple[tuple[bytes, str], ...]:
    known: dict[bytes, str] = {}
    text = _text("tokens", path, read_file("tokens", path, secret=True))
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"tokens={str(path)!r}, line {number}"
        if len(words) != 2 or not _TOKEN.fullmatch(words[1]):
            raise ValueError(f"{where}: expected a worker's name and its token of {_FORM}")
        try:
            check_worker_name(words[0])
        except InvalidError as error:
            raise ValueError(f"{where}: {error}") from error
        if known.setdefault(_digest(words[1]), words[0]) != words[0]:
            raise ValueError(f"{where}: expected a token of its own for each worker")
    if not known:
        raise ValueError(f"tokens={str(path)!r}: expected a line 'worker token' at least")
    return tuple(known.items())
