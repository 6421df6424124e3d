"""Slots for frames, which every rank sizes alike, and what a slot says about the frame in it.

A slot is sized from what its users know alike, the frames of the last steps, so that one collective
carries frames of different lengths.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from topq_dist.compress.codec.frame import peek_header
from topq_dist.compress.coherence import NO_COHERENCE, Coherence
from topq_dist.exchange.agreement import ExchangeError, SettingsDifferError

# frame length, digest of the settings it was made with, whether the rank has failed, whether a
# frame of its has no room in its slot, the two sums of its coherence
_HEAD = struct.Struct("<QIHHdd")
_SLOT_ALIGN_BYTES = 64
NO_FRAME = torch.empty(0, dtype=torch.uint8)


class Head(NamedTuple):
    """What a slot says about the frame in it."""

    frame_bytes: int
    settings_digest: int
    failed: bool
    tailed: bool
    coherence: Coherence = NO_COHERENCE


class ReusableBuffer:
    """A byte buffer that steps use one after the other; who takes it while it is lent has another.

    What is never brought back, by an aborted pass, may still be written to, and is lent to no one.
    """

    def __init__(self) -> None:
        self._spare = NO_FRAME

    def take(self, numel: int, device: torch.device) -> Tensor:
        """Return `numel` bytes of any content, this borrower's until `release`."""
        spare, self._spare = self._spare, NO_FRAME
        if spare.numel() < numel or spare.device != device:
            spare = torch.empty(numel + numel // 8, dtype=torch.uint8, device=device)
        return spare[:numel]

    def release(self, lent: Tensor) -> None:
        """Take back what `take` has returned, or a view of it."""
        # more than was asked for, where the buffer was larger
        whole = lent.untyped_storage()
        self._spare = torch.empty(0, dtype=torch.uint8, device=lent.device).set_(whole)


class Slot:
    """How many bytes are reserved for a frame of one bucket, the same on each rank that uses it.

    spare: room beyond the frame of the last step, the longest of several, as a fraction of it.
    """

    def __init__(self, spare: float = 0.02) -> None:
        self._spare = spare
        self.bytes = _SLOT_ALIGN_BYTES

    @property
    def room_bytes(self) -> int:
        """The length of the longest frame that fits."""
        return self.bytes - _HEAD.size

    def holds(self, frame_bytes: int) -> bool:
        """Return whether a frame of this length fits."""
        return frame_bytes <= self.room_bytes

    def fit(self, frame_bytes: int) -> None:
        """Make room for a frame of this length and the spare, in whole cache lines.

        A slot shrinks slowly: a step that overflowed, or drew a higher q, says little of the next.
        """
        need = int((_HEAD.size + frame_bytes) * (1.0 + self._spare))
        need = max(need, int(0.9 * self.bytes))
        self.bytes = -(-need // _SLOT_ALIGN_BYTES) * _SLOT_ALIGN_BYTES


def pack(
    row: Tensor,
    frame: Tensor | None,
    settings_digest: int,
    *,
    coherence: Coherence,
    tailed: bool = False,
) -> None:
    """Write a slot, its head and what it holds of the frame; None says that this rank has failed.

    What is behind the frame is zero.

    tailed: whether a frame of this rank, this one or another, does not fit its slot.
    """
    length = 0 if frame is None else frame.numel()
    write_head(row, Head(length, settings_digest, frame is None, tailed, coherence))
    held = NO_FRAME if frame is None else frame[: row.numel() - _HEAD.size]
    end = _HEAD.size + held.numel()
    row[_HEAD.size : end] = held
    # other ranks are to see nothing of this process's memory
    row[end:] = 0


def write_head(row: Tensor, head: Head) -> None:
    """Write a slot's head."""
    fields = _HEAD.pack(*head[:4], *head.coherence)
    row[: _HEAD.size] = torch.frombuffer(bytearray(fields), dtype=torch.uint8)


def is_finite(row: Tensor) -> bool:
    """Return whether the frame in a slot, of which the header must be there, says so."""
    return peek_header(row[_HEAD.size :]).finite


def unpack(row: Tensor) -> Head:
    """Read a slot's head."""
    length, settings_digest, failed, tailed, *sums = _HEAD.unpack(
        row[: _HEAD.size].numpy().tobytes()
    )
    return Head(length, settings_digest, bool(failed), bool(tailed), Coherence(*sums))


def frame_in(row: Tensor, head: Head) -> Tensor:
    """Return what a slot holds of its frame, sharing its memory."""
    return row[_HEAD.size : _HEAD.size + head.frame_bytes]


def check_heads(heads: Sequence[Head]) -> None:
    """Raise ExchangeError where a rank has failed or has other settings than rank 0."""
    failed = [str(rank) for rank, head in enumerate(heads) if head.failed]
    if failed:
        raise ExchangeError(
            f"rank {', '.join(failed)} could not compress its gradient, and says why in an "
            "error of its own; this rank stops with it"
        )
    others = [
        str(rank)
        for rank, head in enumerate(heads)
        if head.settings_digest != heads[0].settings_digest
    ]
    if others:
        raise SettingsDifferError(f"rank {', '.join(others)} has other settings than rank 0")
