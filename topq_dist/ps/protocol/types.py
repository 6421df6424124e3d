"""The words that server and worker share: points, pushes, answers and updates.

protos/topq_dist/v1/parameter_server.proto says what they mean on the wire.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from topq_dist.ps.protocol.errors import InvalidError

if TYPE_CHECKING:  # status and health import this file, and are to be free of torch
    from topq_dist.compress.codec.frame import Frame

CHUNK_BYTES = 1 << 20
MAX_CHUNK_BYTES = 2 << 20
# a longer Join goes as chunks, up to as many as this
SHORT_JOIN_BYTES = 2 << 20
MAX_JOIN_BYTES = 64 << 20
# frames, and an answer, that cost less in one message each way than as streams
SHORT_BYTES = 1 << 20
# what may be on its way unread: a frame of a gradient goes out at once, however long the round trip
STREAM_WINDOW_BYTES = 2 << 20
CHAIN_BYTES = 32
DIGEST_BYTES = 32
INSTANCE_BYTES = 16
# of versions and pushes, as they fit the wire
LARGEST_COUNT = 2**63 - 1
FIRST_CHAIN = bytes(CHAIN_BYTES)
_WORKER_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """A state of the model: its version, and the hash of all that led to it."""

    version: int
    chain: bytes


START = ModelVersion(version=0, chain=FIRST_CHAIN)


def point_to_state(point: ModelVersion) -> dict[str, Any]:
    """Return `point` as numbers and strings, for a saved state."""
    return {"version": point.version, "chain": point.chain.hex()}


def point_from_state(state: Mapping[str, Any]) -> ModelVersion:
    """Return what `point_to_state` returned; raises KeyError, TypeError or ValueError."""
    version, chain = state["version"], bytes.fromhex(state["chain"])
    is_whole = isinstance(version, int) and not isinstance(version, bool)
    if not is_whole or not 0 <= version <= LARGEST_COUNT:
        raise ValueError(f"version {version!r}: expected a whole number of at least 0")
    if len(chain) != CHAIN_BYTES:
        raise ValueError(f"a chain of {len(chain)} bytes: expected {CHAIN_BYTES}")
    return ModelVersion(version=version, chain=chain)


@dataclass(frozen=True, kw_only=True)
class Push:
    """A worker's gradient for one step, decoded and checked.

    frames: one for each vector of the model; none where the worker has no gradient in this step.
    lr, momentum, weight_decay: of each parameter group; empty: the server's own.
    coherence: the two sums of its gradient and residuals (compress/coherence.py), or nothing.
    no_gradient: which tensors it has no gradient of, as ModelSpec.without_gradient reads it.
    applied_version, members: in a replay, where the push was applied before and beside whom.
    frame_bytes: what the frames took on the wire.
    """

    worker: str
    epoch: int
    sequence: int
    base: ModelVersion
    frames: tuple[Frame, ...]
    lr: tuple[float, ...]
    digest: bytes
    applied_version: int = 0
    members: tuple[str, ...] = ()
    momentum: tuple[float, ...] = ()
    coherence: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()
    no_gradient: bytes = b""
    frame_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class NewPush:
    """A push as its worker makes it.

    frames: one for each vector, or none. lr, momentum, weight_decay: of each group, or none.
    coherence: its numbers, or none. no_gradient: says which tensors have none. counted_at: the rate
    that the residual of each tensor is counted at, as ResidualRates tells it, which is not sent;
    empty: not known.
    """

    frames: tuple[memoryview, ...] = ()
    lr: tuple[float, ...] = ()
    momentum: tuple[float, ...] = ()
    coherence: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()
    no_gradient: bytes = b""
    counted_at: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PushRecord:
    """A push as its worker sends it and records it: the bytes, and what became of them.

    applied: the point of the version that holds it, None until that is known. members: whose
    pushes that version averages. The others: see NewPush.
    """

    sequence: int
    base: ModelVersion
    frames: tuple[memoryview, ...]
    lr: tuple[float, ...]
    digest: bytes
    applied: ModelVersion | None = None
    members: tuple[str, ...] = ()
    momentum: tuple[float, ...] = ()
    coherence: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()
    no_gradient: bytes = b""
    counted_at: tuple[float, ...] = ()

    @property
    def applied_version(self) -> int:
        """The version that holds the push; 0 until that is known."""
        return 0 if self.applied is None else self.applied.version

    @property
    def frame_bytes(self) -> int:
        """Bytes of all frames together."""
        return sum(frame.nbytes for frame in self.frames)


class UpdateKind(Enum):
    """Meaning of an update's payloads for what a worker holds."""

    SET = 1
    ADD = 2
    FULL = 3


@dataclass(frozen=True, kw_only=True)
class Update:
    """The way of a worker to `point`: a frame (SET, ADD) or raw bytes (FULL) for each vector.

    checksum: `raw_checksum` of the payloads of a FULL one; None: not known.
    """

    kind: UpdateKind
    point: ModelVersion
    payloads: tuple[memoryview, ...]
    checksum: int | None = None

    @classmethod
    def made(
        cls, kind: UpdateKind, point: ModelVersion, payloads: tuple[memoryview, ...]
    ) -> Update:
        """Return the update, its checksum computed where frames do not bring their own."""
        checksum = raw_checksum(payloads) if kind is UpdateKind.FULL else None
        return cls(kind=kind, point=point, payloads=payloads, checksum=checksum)

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of all payloads together."""
        return sum(payload.nbytes for payload in self.payloads)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The outcome of a push.

    applied: the point of the version that holds it, or None where it was refused as stale.
    members: whose pushes that version averages. updates: from the push's base on, oldest first.
    disagreement: for people, where its workers sent different numbers for one group.
    """

    applied: ModelVersion | None
    members: tuple[str, ...]
    updates: tuple[Update, ...]
    durable_version: int
    disagreement: str = ""

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of the payloads of all updates together."""
        return sum(update.payload_bytes for update in self.updates)


@dataclass(frozen=True, kw_only=True)
class GroupView:
    """A parameter group of the inner optimizer as workers see it.

    takes_momentum: whether a push may set its momentum, which is betas[0] where there are betas.
    takes_coherence: whether the coherence of pushes says something to its rate.
    takes_weight_decay: whether a push may set its weight decay.
    keeps_rate: whether residuals are to follow the rate of its steps, which is summed up with the
        momentum where sums_momentum says so.
    remembers_squares: whether its steps depend on squares of earlier gradients.
    """

    names: tuple[str, ...]
    numbers: Mapping[str, float]
    betas: tuple[float, ...] = ()
    takes_momentum: bool = False
    takes_coherence: bool = False
    takes_weight_decay: bool = False
    keeps_rate: bool = False
    sums_momentum: bool = False
    remembers_squares: bool = False


def check_worker_name(worker: str) -> str:
    """Return `worker` where it can name one; raises InvalidError."""
    if not isinstance(worker, str) or not _WORKER_NAME.fullmatch(worker):
        raise InvalidError(
            f"worker={worker!r}: expected 1 to 64 letters, digits, dots, hyphens or underscores"
        )
    return worker


def group_momentum(group: Mapping[str, Any]) -> float | None:
    """Return betas[0] or momentum of a torch parameter group; None where it has neither."""
    betas = group.get("betas")
    momentum = group.get("momentum") if betas is None else betas[0]
    return None if momentum is None else float(momentum)


def set_group_momentum(group: MutableMapping[str, Any], momentum: float) -> None:
    """Make this what `group_momentum` returns of a group."""
    if "betas" in group:
        group["betas"] = (momentum, *group["betas"][1:])
    else:
        group["momentum"] = momentum


def push_digest(
    lr: Sequence[float],
    frames: Iterable[memoryview],
    momentum: Sequence[float] = (),
    coherence: Sequence[float] = (),
    weight_decay: Sequence[float] = (),
    no_gradient: bytes = b"",
) -> bytes:
    """Return the SHA-256 by which a push is known: its numbers, then the frames' bytes."""
    digest = hashlib.sha256(struct.pack(f"<{len(lr)}d", *lr))
    # marked, or they could be taken for learning rates
    marked = (b"momentum", momentum), (b"coherence", coherence), (b"weight_decay", weight_decay)
    for mark, numbers in marked:
        if numbers:
            digest.update(mark + struct.pack(f"<{len(numbers)}d", *numbers))
    if no_gradient:
        digest.update(b"no_gradient" + no_gradient)
    for frame in frames:
        digest.update(frame)
    return digest.digest()


def raw_checksum(vectors: Iterable[memoryview]) -> int:
    """Return the CRC-32, as frames have it, of raw vectors one behind the other."""
    checksum = 0
    for vector in vectors:
        checksum = zlib.crc32(vector, checksum)
    return checksum


def next_chain(chain: bytes, pushes: Iterable[tuple[str, int, bytes]]) -> bytes:
    """Return the chain after a version that applied these (worker, sequence, digest), sorted."""
    digest = hashlib.sha256(chain)
    for worker, sequence, push in sorted(pushes):
        name = worker.encode()
        digest.update(struct.pack("<QQ", len(name), sequence) + name + push)
    return digest.digest()
