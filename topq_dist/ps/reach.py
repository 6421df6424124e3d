"""Why a connection to a server does not come about, in words that its user can act on."""

from __future__ import annotations

import socket
import ssl

from topq_dist.ps.address import Address
from topq_dist.ps.tls import ClientTls

# What an HTTP/2 client says first: its preface, and settings that change nothing.
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def why_unreachable(address: Address, tls: ClientTls | None, timeout_s: float = 2.0) -> str | None:
    """Return why a client cannot talk to the server at `address`, or None where it could.

    gRPC's own errors say no more than that a socket was closed. This connects once more, by hand.
    """
    try:
        with address.connect(timeout_s) as end:
            if tls is None:
                return _why_no_plain_talk(address, end, timeout_s)
            return _why_no_handshake(address, end, tls)
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except OSError as error:
        return f"{error.strerror or error}".lower()


def _why_no_plain_talk(address: Address, end: socket.socket, timeout_s: float) -> str | None:
    try:
        end.sendall(_HTTP2_HELLO)
        if end.recv(1):
            return None
    except ConnectionError:
        pass
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    try:
        with address.connect(timeout_s) as again, blind.wrap_socket(again):
            return "the server speaks TLS: give the CA of its certificate"
    except OSError:
        return "the server ended the connection: is this a parameter server?"


def _why_no_handshake(address: Address, end: socket.socket, tls: ClientTls) -> str | None:
    context = ssl.create_default_context(cafile=tls.ca)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC does
    context.set_alpn_protocols(["h2"])
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    try:
        with context.wrap_socket(
            end, server_hostname=tls.server_name or address.host or "localhost"
        ) as encrypted:
            # With TLS 1.3 a client is through before the server has seen its certificate.
            if encrypted.recv(1):
                return None
    except ssl.SSLCertVerificationError as error:
        ca = "a CA that comes with gRPC" if tls.ca is None else f"ca={str(tls.ca)!r}"
        return f"the server's certificate does not hold against {ca}: {error.verify_message}"
    except (ssl.SSLError, ConnectionError) as error:
        if getattr(error, "reason", None) in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            return "the server does not speak TLS"
    if tls.certificate is None:
        return "the server hung up on a client without certificate: it seems to want one"
    return f"the server does not take certificate={str(tls.certificate)!r} of this client"
