"""Questions to the coordinator and its answers, where protocol/types.py has no word for them."""

from __future__ import annotations

from dataclasses import dataclass

from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.types import GroupView, ModelVersion
from topq_dist.ps.state.ledger import Verdict


@dataclass(frozen=True, kw_only=True)
class WorkerId:
    """The worker that speaks, in which run, and as which of its processes."""

    run: str
    worker: str
    epoch: int


@dataclass(frozen=True, kw_only=True)
class JoinCall:
    """A worker's words when it joins; the fields are those of JoinRequest."""

    run: str
    worker: str
    instance: bytes
    epoch: int
    next_sequence: int
    held: ModelVersion | None
    first_kept: int
    spec: ModelSpec


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The answer to a worker that has joined; the fields are those of JoinResponse."""

    caller: WorkerId
    next_sequence: int
    point: ModelVersion
    durable_version: int
    upload: bool
    groups: tuple[GroupView, ...]


@dataclass(frozen=True, kw_only=True)
class PushPermit:
    """The word that a push may be sent, and what is known of it before its frames are there.

    spec: of the model that it must fit. verdict: the ledger's. place: what the worker's place in
    the run was then; while it is the same, so is the verdict.
    """

    caller: WorkerId
    sequence: int
    digest: bytes
    spec: ModelSpec
    verdict: Verdict
    place: tuple[object, object]
