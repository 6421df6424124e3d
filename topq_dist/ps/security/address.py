"""Addresses at which a server listens: HOST:PORT, [IPV6]:PORT or unix:PATH."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from dataclasses import dataclass

from topq_dist.loopback import is_loopback

_HOST_PORT = re.compile(
    r"(?:\[(?P<ipv6>[^\[\]]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})"
)
_ZONE_OF_URL = re.compile(r"%25(?=.)")
# of addresses that this machine does not have
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_LONGEST_PATH_BYTES = 107  # of a sockaddr_un, its closing zero left out


@dataclass(frozen=True, kw_only=True)
class Address:
    """An address, read from text by `parse`; a Unix socket has a path, and port 0."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return what `text` says; raises ValueError."""
        if isinstance(text, str) and text.startswith("unix:"):
            path = text.removeprefix("unix:").removeprefix("//")
            if not path or "\0" in path or len(os.fsencode(path)) > _LONGEST_PATH_BYTES:
                raise ValueError(
                    f"address={text!r}: expected unix: and a path of at most {_LONGEST_PATH_BYTES}"
                    " bytes"
                )
            return cls(path=path)
        match = _HOST_PORT.fullmatch(text) if isinstance(text, str) else None
        if match is None or int(match["port"]) > 65535 or not _is_ipv6(match["ipv6"]):
            raise ValueError(
                f"address={text!r}: expected HOST:PORT, [IPV6]:PORT or unix:PATH, the port from 0"
                " to 65535"
            )
        # a zone in the spelling of URLs, which gRPC reads as well
        ipv6 = None if match["ipv6"] is None else _ZONE_OF_URL.sub("%", match["ipv6"])
        return cls(host=ipv6 or match["host"], port=int(match["port"]))

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def name(self) -> str:
        """The name to expect in a server's certificate: an IPv6 address without its zone."""
        return self.host.partition("%")[0] or "localhost"

    @property
    def is_loopback(self) -> bool:
        """Whether nothing beyond this machine can listen in: other names than localhost count as
        not, wherever they lead today.
        """
        return bool(self.path) or is_loopback(self.host)

    def with_port(self, port: int) -> Address:
        """Return the same host at `port`; a Unix socket stays as it is."""
        return self if self.path else Address(host=self.host, port=port)

    def to_reach(self) -> Address:
        """Return where to reach a server of this machine that listens here: the loopback address
        for one that listens on all. Raises ValueError for port 0.
        """
        if not self.path and not self.port:
            raise ValueError(f"address={str(self)!r}: expected the port of a server, not 0")
        every = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not bound
        return self if self.path else Address(host=every.get(self.host, self.host), port=self.port)

    def connect(self, timeout_s: float) -> socket.socket:
        """Return a connected stream socket; raises OSError."""
        if not self.path:
            return socket.create_connection((self.host, self.port), timeout_s)
        end = socket.socket(socket.AF_UNIX)
        try:
            end.settimeout(timeout_s)
            end.connect(self.path)
        except OSError:
            end.close()
            raise
        return end

    def check_free(self) -> None:
        """Raise OSError, naming the address, where a server could not listen here.

        gRPC says less: that it failed; and it takes a Unix socket away from a living server.
        """
        try:
            if self.path:
                self._check_path_free()
                return
            self._check_port_free()
        except OSError as error:
            raise OSError(f"address {self}: {error.strerror or error}") from error

    def _check_port_free(self) -> None:
        found = socket.getaddrinfo(
            self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        missing: list[OSError] = []
        for family, kind, _, _, place in found:
            try:
                with socket.socket(family, kind) as end:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    end.bind(place)
            except OSError as error:
                # a name may lead to ::1 as well where IPv6 is off: gRPC takes what there is
                if error.errno not in _NOT_HERE:
                    raise
                missing.append(error)
        if len(missing) == len(found):
            raise missing[0]

    def _check_path_free(self) -> None:
        try:
            self.connect(1.0).close()
        except FileNotFoundError:
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(self.path)
            os.unlink(self.path)  # noqa: PTH108 - of a path as bind takes it
        except ConnectionRefusedError:
            pass  # left behind by a server that was killed: gRPC binds it anew
        else:
            raise OSError("a server listens there already")


def _is_ipv6(text: str | None) -> bool:
    if text is None:
        return True
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True
