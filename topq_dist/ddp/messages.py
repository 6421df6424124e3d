"""Frames between ranks, in slots that every rank sizes alike, and agreement between ranks.

A slot is sized from what all ranks know, the frames of the last step, so that one collective
carries frames of different lengths. A frame that does not fit its slot (the first one never does)
announces its length, and all ranks, having read the same announcements, gather once more.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.telemetry import Meter

# frame length, digest of the settings it was made with, 1 where the rank has failed, a note
_PREAMBLE = struct.Struct("<QIIQ")
_SLOT_ALIGN_BYTES = 64
_FAILED = "could not make its hook:"
NO_FRAME = torch.empty(0, dtype=torch.uint8)


class ExchangeError(RuntimeError):
    """Ranks disagree, or one of them failed; raised on every rank of the group."""


class SettingsDifferError(ExchangeError):
    """Some ranks compressed with other settings than rank 0; every rank sees the same list."""


def digest(text: str) -> int:
    """Return 32 bits that differ, as good as surely, where two ranks' settings differ."""
    return zlib.crc32(text.encode())


class Head(NamedTuple):
    """What a slot says about the frame in it."""

    frame_bytes: int
    settings_digest: int
    failed: int
    note: int


class Slot:
    """How many bytes each rank reserves for its frame of one bucket, the same on every rank.

    spare: room beyond the longest frame of the last step, as a fraction of it.
    """

    def __init__(self, spare: float = 0.02) -> None:
        self._spare = spare
        self.bytes = _SLOT_ALIGN_BYTES

    def holds(self, frame_bytes: int) -> bool:
        """Return whether a frame of this length fits."""
        return _PREAMBLE.size + frame_bytes <= self.bytes

    def fit(self, frame_lengths_bytes: Sequence[int]) -> None:
        """Make room for the longest of these frames and the spare, in whole cache lines.

        A slot shrinks slowly: a step that overflowed, or drew a higher q, says little of the next.
        """
        need = int((_PREAMBLE.size + max(frame_lengths_bytes)) * (1.0 + self._spare))
        need = max(need, int(0.9 * self.bytes))
        self.bytes = -(-need // _SLOT_ALIGN_BYTES) * _SLOT_ALIGN_BYTES


def pack(row: Tensor, frame: Tensor | None, settings_digest: int, note: int = 0) -> None:
    """Write a slot: its head, and the frame where it fits; None says that this rank has failed."""
    length = 0 if frame is None else frame.numel()
    head = _PREAMBLE.pack(length, settings_digest, int(frame is None), note)
    row[: _PREAMBLE.size] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    if frame is not None and _PREAMBLE.size + length <= row.numel():
        row[_PREAMBLE.size : _PREAMBLE.size + length] = frame


def unpack(row: Tensor) -> Head:
    """Read a slot's head."""
    return Head(*_PREAMBLE.unpack(row[: _PREAMBLE.size].numpy().tobytes()))


def frame_in(row: Tensor, head: Head) -> Tensor:
    """Return the frame in a slot, sharing its memory."""
    return row[_PREAMBLE.size : _PREAMBLE.size + head.frame_bytes]


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


def member(work: dist.Work | None) -> dist.Work:
    """Return `work`, which torch leaves out for a process outside the group."""
    if work is None:
        raise RuntimeError("this process is no member of the process group it trains in")
    return work


class FrameGather:
    """The frames of one bucket on their way to every rank.

    Starts an asynchronous all-gather at once; `frames` waits for it. A frame of None says that
    this rank has failed, and lets the others know instead of leaving them to wait. `note` is a
    number for the other ranks, of which `highest_note` is the highest once they have come.
    """

    def __init__(
        self,
        frame: Tensor | None,
        *,
        settings_digest: int,
        slot: Slot,
        group: dist.ProcessGroup,
        device: torch.device,
        meter: Meter,
        note: int = 0,
    ) -> None:
        self._group = group
        self._slot = slot
        self._device = device
        self._meter = meter
        self._frame = frame
        self._settings_digest = settings_digest
        self._note = note
        self.highest_note = note
        self._received, self._work = self._gather()

    def _gather(self) -> tuple[Tensor, dist.Work]:
        outgoing = torch.zeros(self._slot.bytes, dtype=torch.uint8)
        pack(outgoing, self._frame, self._settings_digest, self._note)
        peers = self._group.size()
        received = torch.empty((peers, outgoing.numel()), dtype=torch.uint8, device=self._device)
        work = dist.all_gather(
            list(received.unbind()), outgoing.to(self._device), group=self._group, async_op=True
        )
        self._meter.add(sent_bytes=outgoing.numel(), wire_bytes=outgoing.numel() * (peers - 1))
        return received, member(work)

    def frames(self) -> list[Tensor]:
        """Return the frames in rank order, each a 1-D uint8 tensor on the CPU.

        Raises ExchangeError, on every rank, where a rank failed or has other settings.
        """
        with self._meter.timed("wait_s"):
            self._work.wait()
            slots = self._received.cpu()
            heads = [unpack(row) for row in slots]
            check_heads(heads)
            longest = max(head.frame_bytes for head in heads)
            fits = self._slot.holds(longest)
            self._slot.fit([longest])
            if not fits:
                self._received, self._work = self._gather()
                self._work.wait()
                slots = self._received.cpu()
        self.highest_note = max(head.note for head in heads)
        return [frame_in(row, head) for row, head in zip(slots, heads, strict=True)]


def gather_texts(text: str, *, group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """Return each rank's `text`, in rank order; a collective that all ranks must call."""
    mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
    size = group.size()
    lengths = torch.empty((size, 1), dtype=torch.int64, device=device)
    dist.all_gather(
        list(lengths.unbind()), torch.tensor([mine.numel()], device=device), group=group
    )
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: mine.numel()] = mine
    gathered = torch.empty((size, longest), dtype=torch.uint8, device=device)
    dist.all_gather(list(gathered.unbind()), padded, group=group)
    return [
        bytes(row[: int(length)].numpy().data).decode()
        for row, length in zip(gathered.cpu(), lengths, strict=True)
    ]


def tell_of_failure(error: Exception, *, group: dist.ProcessGroup, device: torch.device) -> None:
    """Take the place of `agree` on a rank that has failed, so that no other waits for it."""
    gather_texts(f"{_FAILED} {error}", group=group, device=device)


def agree(text: str, *, group: dist.ProcessGroup, device: torch.device) -> None:
    """Return when every rank of `group` has the same `text`; a collective that all must call.

    Raises ExchangeError on every rank, quoting the first line in which two ranks differ.
    """
    texts = gather_texts(text, group=group, device=device)
    for rank, other in enumerate(texts):
        if other.startswith(_FAILED):
            raise ExchangeError(f"rank {rank} {other}")
    for rank, other in enumerate(texts):
        if other != texts[0]:
            first, second = _first_difference(texts[0], other)
            raise ExchangeError(
                f"ranks disagree: rank 0 has {first!r}, rank {rank} has {second!r}; "
                "expected the same settings and the same model on every rank"
            )


def _first_difference(one: str, other: str) -> tuple[str, str]:
    lines, others = one.split("\n"), other.split("\n")
    shorter = min(len(lines), len(others))
    at = next((i for i in range(shorter) if lines[i] != others[i]), shorter)
    end = "nothing more"
    return lines[at] if at < len(lines) else end, others[at] if at < len(others) else end
