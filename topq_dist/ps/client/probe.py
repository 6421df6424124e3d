"""Questions to a server that need no place in its run: its status, its health, why it is silent."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from topq_dist.ps.security.address import Address
from topq_dist.ps.security.policy import ClientSecurity
from topq_dist.ps.security.proxy import proxy_of
from topq_dist.ps.security.tls import ClientTls
from topq_dist.v1 import parameter_server_pb2 as pb
from topq_dist.v1 import parameter_server_pb2_grpc as pb_grpc

Reply = TypeVar("Reply")
_NO_CONNECTION = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
# These two may pass, or mean nothing: before a server is there a port proxy accepts and hangs up.
_ENDED = "the server ended the connection: is this a parameter server?"
_OTHER_CAS = "the server's certificate does not hold against this machine's CAs (gRPC has its own)"
# What an HTTP/2 client says first: its preface, and settings that change nothing.
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def diagnose_connection(
    address: Address, tls: ClientTls | None, timeout_s: float = 2.0
) -> str | None:
    """Return why a client cannot talk to the server at `address`, or None where it could.

    gRPC's own errors say no more than that a socket was closed. This connects once more, by hand,
    through the proxy that gRPC goes through.
    """
    proxy = proxy_of(address)
    try:
        why = _why_no_talk(address, tls, timeout_s)
        return why if why is None or proxy is None else f"{why} (through {proxy})"
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except OSError as error:
        why = f"{error.strerror or error}"
        return why if proxy else why.lower()


def lasting_reason(address: Address, tls: ClientTls | None, timeout_s: float = 2.0) -> str | None:
    """Return why the server at `address` will not take this client however often it tries.

    None where it may: nothing is wrong, or it is not there now.
    """
    try:
        why = _why_no_talk(address, tls, timeout_s)
    except OSError:
        return None
    return None if why is None or why.startswith((_ENDED, _OTHER_CAS)) else why


def _why_no_talk(address: Address, tls: ClientTls | None, timeout_s: float) -> str | None:
    with _connect(address, timeout_s) as end:
        if tls is None:
            return _why_no_plain_talk(address, end, timeout_s)
        return _why_no_handshake(address, end, tls)


def _connect(address: Address, timeout_s: float) -> socket.socket:
    proxy = proxy_of(address)
    return address.connect(timeout_s) if proxy is None else proxy.connect(address, timeout_s)


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
        with _connect(address, timeout_s) as again, blind.wrap_socket(again):
            return "the server speaks TLS: give the CA of its certificate"
    except OSError:
        return _ENDED


def _why_no_handshake(address: Address, end: socket.socket, tls: ClientTls) -> str | None:
    context = ssl.create_default_context(cafile=tls.ca)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC does
    context.set_alpn_protocols(["h2"])
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    try:
        end.getpeername()  # of one that has been reset by now, ssl would leave a socket open
        encrypted = context.wrap_socket(end, server_hostname=tls.server_name or address.name)
    except ssl.SSLCertVerificationError as error:
        against = f"the server's certificate does not hold against ca={str(tls.ca)!r}"
        return f"{_OTHER_CAS if tls.ca is None else against}: {error.verify_message}"
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError):
        return _ENDED
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            return "the server does not speak TLS"
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return _ENDED
        raise
    else:
        with encrypted, suppress(ssl.SSLError, ConnectionError):
            # With TLS 1.3 a client is through before the server has seen its certificate.
            if encrypted.recv(1):
                return None
    if tls.certificate is None:
        return "the server hung up on a client without certificate: it seems to want one"
    return f"the server does not take certificate={str(tls.certificate)!r} of this client"


class NoAnswerError(Exception):
    """A server that did not answer; the message names it and says why."""


def ask_status(
    address: str, security: ClientSecurity, *, timeout_s: float, state_sha256: bool = False
) -> pb.StatusResponse:
    """Return the status of the server at `address`; state_sha256 has it hash its whole state.

    Raises NoAnswerError, and ValueError for an address or files that cannot be.
    """

    def ask(channel: grpc.Channel) -> pb.StatusResponse:
        return pb_grpc.ParameterServerStub(channel).Status(
            pb.StatusRequest(state_sha256=state_sha256),
            timeout=timeout_s,
            metadata=security.metadata(),
        )

    return _ask(address, security, ask)


def ask_health(address: str, security: ClientSecurity, *, timeout_s: float) -> str:
    """Return what the server at `address` says of itself: "SERVING" or "NOT_SERVING".

    Raises NoAnswerError, and ValueError for an address or files that cannot be.
    """

    def ask(channel: grpc.Channel) -> str:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=timeout_s
        )
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    return _ask(address, security, ask)


def _ask(address: str, security: ClientSecurity, ask: Callable[[grpc.Channel], Reply]) -> Reply:
    where = security.check(address)
    with security.channel(address) as channel:
        try:
            return ask(channel)
        except grpc.RpcError as error:
            if not isinstance(error, grpc.Call):
                raise
            code, details = error.code(), error.details()
    why = diagnose_connection(where, security.tls) if code in _NO_CONNECTION else None
    if why is None:
        why = f"{details or 'no reason given'} ({code.name})"
    raise NoAnswerError(f"no answer from {where}: {' '.join(why.split())}")
