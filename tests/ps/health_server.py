"""A server with nothing but health, and clients that ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from ps.certificates import Pair

from topq_dist.ps.security.address import Address
from topq_dist.ps.security.policy import ClientSecurity, ServerSecurity
from topq_dist.ps.security.tls import ClientTls, ServerTls


@contextmanager
def serving(security: ServerSecurity, address: str = "127.0.0.1:0") -> Iterator[Address]:
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    where = security.bind(server, address)
    server.start()
    try:
        yield where
    finally:
        server.stop(None).wait()


def code_of(error: grpc.RpcError) -> grpc.StatusCode:
    assert isinstance(error, grpc.Call)
    return error.code()


def ask(where: Address, security: ClientSecurity, *, timeout_s: float = 10) -> grpc.StatusCode:
    with security.channel(str(where)) as channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            return code_of(error)
    return grpc.StatusCode.OK


def server_tls(pair: Pair, client_ca: Path | None = None) -> ServerTls:
    return ServerTls(certificate=pair.certificate, key=pair.key, client_ca=client_ca)


def client_tls(ca: Path, pair: Pair | None = None) -> ClientTls:
    if pair is None:
        return ClientTls(ca=ca)
    return ClientTls(ca=ca, certificate=pair.certificate, key=pair.key)


def unchecked_call(where: Address, ca: Path, pair: Pair) -> grpc.StatusCode:
    """Ask as a client would that does not look at its own certificate first."""
    credentials = grpc.ssl_channel_credentials(
        ca.read_bytes(), pair.key.read_bytes(), pair.certificate.read_bytes()
    )
    with grpc.secure_channel(str(where), credentials) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        return code_of(caught.value)
