"""Questions to a running server that need no place in its run: its status, and its health."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from topq_dist.ps.reach import why_unreachable
from topq_dist.ps.security import ClientSecurity
from topq_dist.v1 import parameter_server_pb2 as pb
from topq_dist.v1 import parameter_server_pb2_grpc as pb_grpc

Reply = TypeVar("Reply")
_NO_CONNECTION = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


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
    why = why_unreachable(where, security.tls) if code in _NO_CONNECTION else None
    if why is None:
        why = f"{details or 'no reason given'} ({code.name})"
    raise NoAnswerError(f"no answer from {where}: {' '.join(why.split())}")
