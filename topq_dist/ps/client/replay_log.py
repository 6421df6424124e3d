"""A worker's record of its pushes: the one under way, and those that it may have to replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from topq_dist.compress.codec.frame import decode_frame
from topq_dist.ps.protocol.types import (
    LARGEST_COUNT,
    ModelVersion,
    NewPush,
    PushRecord,
    check_worker_name,
    point_from_state,
    point_to_state,
    push_digest,
)
from topq_dist.validation import check_number


class ReplayLog:
    """The pushes of one worker to one server, numbered without gaps.

    At most one is under way. Those that were applied stay until they are durable.
    """

    def __init__(self) -> None:
        self.pending: PushRecord | None = None
        self._applied: list[PushRecord] = []
        self._next_sequence = 1

    @property
    def next_sequence(self) -> int:
        """The number of the push after the last one that was applied."""
        return self._next_sequence

    @property
    def first_kept(self) -> int:
        """The number of the oldest push that can be sent again; 0: there is none."""
        oldest = self._applied[0] if self._applied else self.pending
        return 0 if oldest is None else oldest.sequence

    @property
    def unsent_sequence(self) -> int:
        """The number of the next push that was never sent."""
        return self._next_sequence + (self.pending is not None)

    def begin(self, base: ModelVersion, new: NewPush) -> PushRecord:
        """Make the next push, which is then under way."""
        if self.pending is not None:
            raise RuntimeError(f"push {self.pending.sequence} is still under way")
        self.pending = PushRecord(
            sequence=self._next_sequence, base=base, digest=_digest(new), **vars(new)
        )
        return self.pending

    def record_applied(
        self, push: PushRecord, applied: ModelVersion, members: Sequence[str]
    ) -> None:
        """Record in which version a push, under way or already applied, was applied."""
        done = replace(push, applied=applied, members=tuple(members))
        if push is self.pending:
            self.pending = None
            self._applied.append(done)
            self._next_sequence = push.sequence + 1
        else:
            self._applied = [done if record is push else record for record in self._applied]

    def forget_durable(self, version: int, *, before: int) -> None:
        """Forget what was applied in `version` or earlier, of the pushes numbered below `before`.

        before: the number that the server expects next. It may have lost what follows, and have
        made and saved versions of the same numbers without it.
        """
        self._applied = [
            record
            for record in self._applied
            if record.sequence >= before or (record.applied and record.applied.version > version)
        ]

    def missing_at(self, server_next: int) -> list[PushRecord] | None:
        """Return what a server that expects `server_next` has lost; None where not all is there."""
        lost = [record for record in self._applied if record.sequence >= server_next]
        if len(lost) != max(0, self._next_sequence - server_next):
            return None
        expected = range(server_next, self._next_sequence)
        return lost if [record.sequence for record in lost] == list(expected) else None

    def take_back(self, sequence: int) -> list[PushRecord]:
        """Forget the pushes from `sequence` on, which is then the next number, and return them."""
        known = [*self._applied, *([self.pending] if self.pending is not None else [])]
        self._applied = [record for record in self._applied if record.sequence < sequence]
        self.pending = None
        self._next_sequence = sequence
        return [record for record in known if record.sequence >= sequence]

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as tensors, numbers and strings."""
        return {
            "next_sequence": self._next_sequence,
            "pending": None if self.pending is None else _to_state(self.pending),
            "applied": [_to_state(record) for record in self._applied],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ReplayLog:
        """Return what `state_dict` returned; raises ValueError for what it cannot have."""
        pushes = cls()
        try:
            pushes._next_sequence = _count(state["next_sequence"], 1)
            pushes._applied = [_from_state(record) for record in state["applied"]]
            if state["pending"] is not None:
                pushes.pending = replace(_from_state(state["pending"]), applied=None, members=())
        except Exception as error:  # there may be anything in it
            raise ValueError(f"no pushes of a worker: {error!r}") from error
        if pushes.pending is not None and pushes.pending.sequence != pushes._next_sequence:
            raise ValueError(
                f"push {pushes.pending.sequence} under way: expected {pushes._next_sequence}"
            )
        if any(record.applied is None for record in pushes._applied):
            raise ValueError("an applied push without its version")
        sequences = [record.sequence for record in pushes._applied] + [pushes._next_sequence]
        if any(one >= following for one, following in pairwise(sequences)):
            raise ValueError(
                f"applied pushes {sequences[:-1]}: expected them to ascend to less than "
                f"{pushes._next_sequence}"
            )
        return pushes

    def check_frames(self, numels: Sequence[int], tensor_count: int) -> None:
        """Raise ValueError unless each push has none, or one for each vector of these lengths.

        tensor_count: how many tensors they hold, each with a rate or none of them.
        """
        for push in (*self._applied, *([] if self.pending is None else [self.pending])):
            if len(push.frames) not in (0, len(numels)):
                raise ValueError(f"{len(push.frames)} frames: expected {len(numels)}, or none")
            if len(push.counted_at) not in (0, tensor_count):
                raise ValueError(
                    f"{len(push.counted_at)} of counted_at: expected {tensor_count}, or none"
                )
            for frame, numel in zip(push.frames, numels, strict=False):
                decode_frame(frame, numel=numel)


def _to_state(push: PushRecord) -> dict[str, Any]:
    return {
        "sequence": push.sequence,
        "base": point_to_state(push.base),
        "frames": [
            torch.from_numpy(np.frombuffer(frame, dtype=np.uint8).copy()) for frame in push.frames
        ],
        "lr": list(push.lr),
        "momentum": list(push.momentum),
        "coherence": list(push.coherence),
        "weight_decay": list(push.weight_decay),
        "no_gradient": push.no_gradient.hex(),
        "counted_at": list(push.counted_at),
        "applied": None if push.applied is None else point_to_state(push.applied),
        "members": list(push.members),
    }


def _from_state(state: Mapping[str, Any]) -> PushRecord:
    frames = tuple(frame.clone().numpy().data for frame in state["frames"])
    if any(frame.format != "B" or frame.ndim != 1 for frame in frames):
        raise ValueError("a frame that is no vector of bytes")
    lr = tuple(check_number("lr", value) for value in state["lr"])
    # older states have none
    momentum, coherence, weight_decay, counted_at = (
        tuple(check_number(key, value) for value in state.get(key, ()))
        for key in ("momentum", "coherence", "weight_decay", "counted_at")
    )
    if min(counted_at, default=0.0) < 0:
        raise ValueError(f"counted_at={counted_at}: expected rates of at least 0")
    new = NewPush(
        frames=frames,
        lr=lr,
        momentum=momentum,
        coherence=coherence,
        weight_decay=weight_decay,
        no_gradient=bytes.fromhex(state.get("no_gradient", "")),
        counted_at=counted_at,
    )
    return PushRecord(
        sequence=_count(state["sequence"], 1),
        base=point_from_state(state["base"]),
        digest=_digest(new),
        applied=None if state["applied"] is None else point_from_state(state["applied"]),
        members=tuple(check_worker_name(member) for member in state["members"]),
        **vars(new),
    )


def _digest(new: NewPush) -> bytes:
    return push_digest(
        new.lr, new.frames, new.momentum, new.coherence, new.weight_decay, new.no_gradient
    )


def _count(value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST_COUNT:
        raise ValueError(f"{value!r}: expected a whole number from {least} to {LARGEST_COUNT}")
    return value
