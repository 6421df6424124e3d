"""Errors of an elastic run."""

from __future__ import annotations


class MemberLostError(RuntimeError):
    """An exchange is void, since a member of the epoch is lost or has left it."""


class RefusedError(RuntimeError):
    """This process cannot be a member of the run, and others go on without it."""
