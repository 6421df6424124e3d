"""TLS at both ends of a connection: credentials from PEM files."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from topq_dist.ps.security.secret_files import Watched, read_file

_HANDSHAKE_TURNS = 8
_WRONG_PURPOSE = 26  # X509_V_ERR_INVALID_PURPOSE of OpenSSL


@dataclass(frozen=True, kw_only=True)
class ServerTls:
    """PEM files: a server's certificate chain and key and, for mutual TLS, its clients' CA."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that take up new files at the next connection, without a restart.

        Raises ValueError for files that do not work, naming the parameter. Later ones that do not
        are logged, and the last good ones stay.
        """
        paths = (self.certificate, self.key, *([self.client_ca] if self.client_ca else []))
        watched = Watched(paths, self._load)
        return grpc.dynamic_ssl_server_credentials(
            watched.current(), watched.current, self.client_ca is not None
        )

    def _load(self) -> grpc.ServerCertificateConfiguration:
        key, certificate = _read_pair(self.certificate, self.key, at_server=True)
        return grpc.ssl_server_certificate_configuration(
            [(key, certificate)], _read_ca("client_ca", self.client_ca)
        )


@dataclass(frozen=True, kw_only=True)
class ClientTls:
    """PEM files of what a worker trusts and shows: `tls=` of a ParameterServerOptimizer.

    ca: of the server's certificate; None: the CAs that come with gRPC.
    certificate, key: for a server that wants to see one; both or neither.
    server_name: to expect in the server's certificate in place of the host that is connected to.

    Raises ValueError where one of certificate and key is missing; what is wrong with the files is
    told where they are read.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError(
                f"certificate={_shown(self.certificate)}, key={_shown(self.key)}: expected both or"
                " neither"
            )

    def credentials(self) -> grpc.ChannelCredentials:
        """Return credentials made of the files as they are now: each new channel takes new ones.

        Raises ValueError for files that do not work, naming the parameter.
        """
        ca = _read_ca("ca", None if self.ca is None else Path(self.ca))
        if self.certificate is None or self.key is None:
            return grpc.ssl_channel_credentials(ca)
        key, certificate = _read_pair(Path(self.certificate), Path(self.key), at_server=False)
        return grpc.ssl_channel_credentials(ca, key, certificate)


def _shown(path: str | Path | None) -> str:
    return repr(None if path is None else str(path))


def _read_ca(name: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    content = read_file(name, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(
            cadata=content.decode("ascii", "ignore")
        )
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"{name}={str(path)!r}: expected certificates as PEM") from error
    return content


def _read_pair(certificate: Path, key: Path, *, at_server: bool) -> tuple[bytes, bytes]:
    """Return key and chain as read, once a handshake in memory has shown that they work."""
    before = read_file("key", key, secret=True), read_file("certificate", certificate)
    try:
        _try_pair(certificate, key, before[1].decode("ascii", "ignore"), at_server=at_server)
    except ssl.SSLCertVerificationError as error:
        # a client with a certificate for servers alone may never be asked for it
        if at_server or error.verify_code != _WRONG_PURPOSE:
            raise ValueError(f"certificate={str(certificate)!r}: {error.verify_message}") from error
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None)
        if reason == "KEY_VALUES_MISMATCH":
            raise ValueError(
                f"key={str(key)!r}: it is not the key of certificate={str(certificate)!r}"
            ) from error
        raise ValueError(
            f"certificate={str(certificate)!r}, key={str(key)!r}: expected a certificate chain and"
            f" its key, not encrypted, as PEM ({reason or error})"
        ) from error
    if before != (read_file("key", key, secret=True), read_file("certificate", certificate)):
        raise ValueError(f"certificate={str(certificate)!r}: changed while it was read")
    return before


def _try_pair(certificate: Path, key: Path, chain: str, *, at_server: bool) -> None:
    """Shake hands with ourselves: raises where the pair does not fit, or is not valid today."""

    def no_password() -> str:
        raise ssl.SSLError("the key is encrypted")

    purpose = (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT)
    shows, sees = (
        ssl.SSLContext(protocol) for protocol in (purpose if at_server else purpose[::-1])
    )
    for context in (shows, sees):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.load_cert_chain(certificate, key, no_password)
    # Trust the chain itself, whoever signed it: dates and purpose are still looked at.
    sees.load_verify_locations(cadata=chain)
    sees.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    sees.verify_mode = ssl.CERT_REQUIRED
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    first = shows.wrap_bio(there, back, server_side=at_server)
    second = sees.wrap_bio(back, there, server_side=not at_server)
    for _ in range(_HANDSHAKE_TURNS):
        for side in (first, second):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
