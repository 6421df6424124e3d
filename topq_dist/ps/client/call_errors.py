"""The errors of a call: which of them another try may cure, and what the others mean."""

from __future__ import annotations

import grpc

from topq_dist.ps.protocol.errors import (
    REASON_KEY,
    REFUSALS,
    DamagedError,
    NotReadyError,
    RefusedError,
    ServerLostError,
    TooLargeError,
)

_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
_TRANSIENT = {
    grpc.StatusCode.DEADLINE_EXCEEDED,
    # too many calls at once, and streams that a dying server breaks off
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    # a stream that lost its connection, as by a damaged byte under TLS
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DATA_LOSS,
}
# gRPC's own words for what another try does not cure
_TOO_LARGE = "larger than max"
_RAISED = "Exception "


class TransientError(Exception):
    """A call that failed in a way that may pass."""


class UnreachedError(TransientError):
    """A call that no server has answered, as far as gRPC knows."""


class DoubtfulError(Exception):
    """A call that failed as one does that is damaged on its way, and as some do for good.

    final: the error of one that fails for good.
    """

    def __init__(self, final: RefusedError | ServerLostError) -> None:
        super().__init__(str(final))
        self.final = final


def meaning_of(error: grpc.RpcError, address: str) -> Exception:
    """Return RefusedError, TransientError or DoubtfulError for an error of a call to `address`."""
    refusal = refusal_of(error)
    if isinstance(refusal, NotReadyError | DamagedError):
        return TransientError(str(refusal))
    if refusal is not None:
        return type(refusal)(f"parameter server {address}: {refusal}")
    known = isinstance(error, grpc.Call)
    code = error.code() if known else grpc.StatusCode.UNKNOWN
    details = (error.details() or "") if known else repr(error)
    too_large = code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in details
    raised = code is grpc.StatusCode.UNKNOWN and details.startswith(_RAISED)
    if code is _UNAVAILABLE:
        return UnreachedError(f"{code.name}: {details}")
    if code in _TRANSIENT and not too_large and not raised:
        return TransientError(f"{code.name}: {details}")
    kind = TooLargeError if too_large else ServerLostError
    return DoubtfulError(kind(f"parameter server {address}: {code.name}: {details}"))


def refusal_of(error: grpc.RpcError) -> RefusedError | None:
    """Return the refusal that a server of this library sent as `error`; None: it was none."""
    if not isinstance(error, grpc.Call):
        return None
    metadata = error.trailing_metadata() or ()
    reasons = [value for key, value in metadata if key == REASON_KEY]
    if not reasons or reasons[0] not in REFUSALS:
        return None
    return REFUSALS[reasons[0]](error.details() or "")
