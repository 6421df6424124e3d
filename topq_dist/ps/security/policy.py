"""Safe by default: in the clear on loopback alone, beyond it with TLS or when told so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from topq_dist.ps.security.address import Address
from topq_dist.ps.security.tls import ClientTls, ServerTls
from topq_dist.ps.security.tokens import Authenticator, check_token, token_metadata


@dataclass(frozen=True, kw_only=True)
class ServerSecurity:
    """A server's means to keep strangers out.

    tls: None speaks in the clear, and then on loopback and Unix sockets alone unless `insecure`.
    tokens: a file of "worker token" lines (see Authenticator); None lets everybody speak in every
    name. Tokens go over TLS or loopback, whatever `insecure` says.
    """

    tls: ServerTls | None = None
    tokens: Path | None = None
    insecure: bool = False

    def check(self, address: str) -> Address:
        """Return `address` where this server may listen there; raises ValueError."""
        where = Address.parse(address)
        if self.tls is not None or where.is_loopback:
            return where
        if not self.insecure:
            raise ValueError(
                f"address={address!r}: in the clear a server listens on loopback alone:"
                " configure TLS (topq serve --tls-cert --tls-key), or say insecure (--insecure)"
                " where everybody on the network may read and alter the training"
            )
        if self.tokens is not None:
            raise ValueError(
                f"tokens={str(self.tokens)!r}: in the clear beyond loopback everybody could read"
                f" them (address={address!r}): configure TLS"
            )
        return where

    def bind(self, server: grpc.Server, address: str) -> Address:
        """Have `server` listen at `address` and return where it does, its port filled in.

        Raises ValueError for an address that this server may not have or files that do not work,
        OSError for one that cannot be had, saying why. The server needs the option
        ("grpc.so_reuseport", 0): two would share a port otherwise.
        """
        where = self.check(address)
        credentials = None if self.tls is None else self.tls.credentials()
        where.check_free()
        try:
            if credentials is None:
                port = server.add_insecure_port(str(where))
            else:
                port = server.add_secure_port(str(where), credentials)
        except RuntimeError as error:
            where.check_free()  # where another was quicker, it knows the reason
            raise OSError(f"address {where}: {error}") from error
        return where.with_port(port)

    def authenticator(self) -> Authenticator | None:
        """Return what checks each call's token, or None without tokens; raises ValueError."""
        return None if self.tokens is None else Authenticator(self.tokens)


@dataclass(frozen=True, kw_only=True)
class ClientSecurity:
    """A client's means to show itself to a server, and to know the server.

    tls: None speaks in the clear. token: sent with each call, over TLS or loopback alone.
    """

    tls: ClientTls | None = None
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.token is not None:
            check_token(self.token)

    def check(self, address: str) -> Address:
        """Return `address` where this client may connect to it; raises ValueError."""
        where = Address.parse(address).to_reach()
        if self.token is not None and self.tls is None and not where.is_loopback:
            raise ValueError(
                f"address={address!r}: a token in the clear goes no further than loopback:"
                " configure TLS"
            )
        return where

    def channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
        """Return a channel to the server at `address`, made with the certificates of now.

        Raises ValueError for an address that it may not have or files that do not work.
        """
        where = self.check(address)
        if where.is_loopback:  # a proxy of the environment would carry it off the machine
            options = [*options, ("grpc.enable_http_proxy", 0)]
        if self.tls is None:
            return grpc.insecure_channel(str(where), options=list(options))
        if self.tls.server_name is not None:
            options = [*options, ("grpc.ssl_target_name_override", self.tls.server_name)]
        return grpc.secure_channel(str(where), self.tls.credentials(), options=list(options))

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what goes with each call."""
        return () if self.token is None else token_metadata(self.token)
