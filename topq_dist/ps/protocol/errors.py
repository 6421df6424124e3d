"""The errors that pass between server and worker; each carries its gRPC status.

This is the only table of them: whoever sends one, or reads one, looks here.
"""

from __future__ import annotations

from typing import Final

# trailing metadata that carries RefusedError.reason, since several share a status
REASON_KEY = "topq-reason"


class ServerLostError(ConnectionError):
    """A parameter server that cannot be talked to; the message names it and says why."""


class RefusedError(Exception):
    """A request that the server does not take; nothing of its state has changed.

    reason: one word for the counters, which also tells this error from others of its status on the
    wire. status: the name of the gRPC status that it travels as.
    """

    reason = "refused"
    status = "UNKNOWN"

    def __init__(self, message: str) -> None:
        super().__init__(message)


class UnauthenticatedError(RefusedError):
    """A call without a token, or with one that the server does not know."""

    reason = "unauthenticated"
    status = "UNAUTHENTICATED"


class WrongTokenError(RefusedError):
    """A call in a worker's name with another worker's token."""

    reason = "permission_denied"
    status = "PERMISSION_DENIED"


class NotJoinedError(RefusedError):
    """The worker has no place in this run."""

    reason = "not_joined"
    status = "FAILED_PRECONDITION"


class WrongRunError(RefusedError):
    """The worker belongs to another run than the server's."""

    reason = "wrong_run"
    status = "FAILED_PRECONDITION"


class ModelDiffersError(RefusedError):
    """The worker's model is not the run's."""

    reason = "model_differs"
    status = "FAILED_PRECONDITION"


class FencedError(RefusedError):
    """A newer process has taken the worker's name."""

    reason = "old_epoch"
    status = "ABORTED"


class SequenceGapError(RefusedError):
    """A sequence number after the next one, which the message names."""

    reason = "sequence_gap"
    status = "OUT_OF_RANGE"


class DigestDiffersError(RefusedError):
    """A sequence number that was applied with other bytes."""

    reason = "digest_differs"
    status = "ALREADY_EXISTS"


class ExpiredError(RefusedError):
    """A repeat whose answer is no longer kept."""

    reason = "forgotten"
    status = "FAILED_PRECONDITION"


class InvalidError(RefusedError):
    """A request that no worker of this library would send."""

    reason = "invalid"
    status = "INVALID_ARGUMENT"


class NonFiniteError(InvalidError):
    """A gradient, a learning rate or a momentum that is NaN or infinite."""

    reason = "non_finite"
    status = "INVALID_ARGUMENT"


class DamagedError(InvalidError):
    """Bytes that are not those that were sent: send them again."""

    reason = "damaged"
    status = "INVALID_ARGUMENT"


class TooLargeError(RefusedError):
    """More than the server agreed to hold."""

    reason = "too_large"
    status = "RESOURCE_EXHAUSTED"


class TooManyWorkersError(RefusedError):
    """A worker beyond the run's maximum."""

    reason = "too_many_workers"
    status = "RESOURCE_EXHAUSTED"


class NotReadyError(RefusedError):
    """The server is starting, draining, or has no model yet: try again."""

    reason = "not_ready"
    status = "UNAVAILABLE"


class BusyError(NotReadyError):
    """More calls at a time than one worker may have: try again."""

    reason = "too_many_calls"
    status = "RESOURCE_EXHAUSTED"


def _refusals(kind: type[RefusedError]) -> list[type[RefusedError]]:
    return [kind, *(found for below in kind.__subclasses__() for found in _refusals(below))]


REFUSALS: Final = {kind.reason: kind for kind in _refusals(RefusedError)}

# what they were called at first: somebody may catch them by these names
OldEpochError = FencedError
ForgottenError = ExpiredError
