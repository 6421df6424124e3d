"""Refusals <-> gRPC: which status says what, and how a client tells one reason from another."""

from __future__ import annotations

import grpc

from topq_dist.ps import protocol
from topq_dist.ps.protocol import RefusedError

# trailing metadata that carries RefusedError.reason, since several share a status
REASON_KEY = "topq-reason"

_STATUS = {
    "not_joined": grpc.StatusCode.FAILED_PRECONDITION,
    "wrong_run": grpc.StatusCode.FAILED_PRECONDITION,
    "model_differs": grpc.StatusCode.FAILED_PRECONDITION,
    "forgotten": grpc.StatusCode.FAILED_PRECONDITION,
    "old_epoch": grpc.StatusCode.ABORTED,
    "sequence_gap": grpc.StatusCode.OUT_OF_RANGE,
    "digest_differs": grpc.StatusCode.ALREADY_EXISTS,
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
    "non_finite": grpc.StatusCode.INVALID_ARGUMENT,
    "too_large": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "too_many_calls": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "too_many_workers": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "not_ready": grpc.StatusCode.UNAVAILABLE,
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "permission_denied": grpc.StatusCode.PERMISSION_DENIED,
}
_KINDS = {
    kind.reason: kind
    for kind in vars(protocol).values()
    if isinstance(kind, type) and issubclass(kind, RefusedError)
}


def status_of(error: RefusedError) -> grpc.StatusCode:
    """Return the gRPC status that stands for `error`."""
    return _STATUS.get(error.reason, grpc.StatusCode.UNKNOWN)


def refusal_of(error: grpc.RpcError) -> RefusedError | None:
    """Return the refusal that a server of this library sent as `error`; None: it was none."""
    if not isinstance(error, grpc.Call):
        return None
    metadata = error.trailing_metadata() or ()
    reasons = [value for key, value in metadata if key == REASON_KEY]
    if not reasons or reasons[0] not in _KINDS:
        return None
    return _KINDS[reasons[0]](error.details() or "")
