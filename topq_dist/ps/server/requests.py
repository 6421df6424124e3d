"""Questions to the coordinator and its answers, where protocol/types.py has no word for them."""

from __future__ import annotations

from dataclasses import dataclass

from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.types import GroupView, ModelVersion


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
class WorkerView:
    """A worker as status shows it; the fields are those of WorkerStatus."""

    worker: str
    epoch: int
    sequence: int
    version: int
    lag: int
    lease_left_s: float
    waiting: bool
    received_bytes: int
    sent_bytes: int


@dataclass(frozen=True, kw_only=True)
class Status:
    """The run as status shows it; the fields are those of StatusResponse."""

    run: str
    point: ModelVersion
    durable_version: int
    numel: int
    workers: tuple[WorkerView, ...]
    refused: dict[str, int]
    received_bytes: int
    sent_bytes: int
    uptime_s: float
    state_sha256: str
    round_workers: int
