"""Errors of an elastic run."""

from __future__ import annotations


class MemberLostError(RuntimeError):
    """An exchange is void, since a member of the epoch is lost or has left it."""


class RefusedError(RuntimeError):
    """This process cannot be a member of the run, and others go on without it."""


def store_lost() -> ConnectionError:
    """Return the error of a process whose store has gone."""
    return ConnectionError(
        "the store of the elastic run does not answer any more: expected one that outlives every "
        "rank; start it again, and then the ranks, from a checkpoint if there is one"
    )
