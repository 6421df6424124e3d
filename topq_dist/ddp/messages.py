"""Frames between ranks, in slots that every rank sizes alike, and agreement between ranks.

A slot is sized from what all ranks know, the frames of the last step, so that one collective
carries frames of different lengths. A frame that does not fit its slot (the first one never does)
announces its length, and all ranks, having read the same announcements, gather once more.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.telemetry import Meter

# frame length in bytes, digest of the settings it was made with, 1 where the rank has failed
_PREAMBLE = struct.Struct("<QII")
_SLOT_ALIGN_BYTES = 64


class ExchangeError(RuntimeError):
    """Ranks disagree, or one of them failed; raised on every rank of the group."""


class SettingsDifferError(ExchangeError):
    """Some ranks compressed with other settings than rank 0; every rank sees the same list."""


def digest(text: str) -> int:
    """Return 32 bits that differ, as good as surely, where two ranks' settings differ."""
    return zlib.crc32(text.encode())


class Slot:
    """How many bytes each rank reserves for its frame of one bucket, the same on every rank."""

    def __init__(self) -> None:
        self.bytes = _SLOT_ALIGN_BYTES

    def fit(self, frame_lengths_bytes: Sequence[int]) -> None:
        """Make room for the longest of these frames and for 2 % more, in whole cache lines."""
        need = _PREAMBLE.size + max(frame_lengths_bytes)
        need += need // 50
        self.bytes = -(-need // _SLOT_ALIGN_BYTES) * _SLOT_ALIGN_BYTES


class FrameGather:
    """The frames of one bucket on their way to every rank.

    Starts an asynchronous all-gather at once; `frames` waits for it. A frame of None says that
    this rank has failed, and lets the others know instead of leaving them to wait.
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
    ) -> None:
        self._group = group
        self._slot = slot
        self._device = device
        self._meter = meter
        self._frame = frame if frame is not None else torch.empty(0, dtype=torch.uint8)
        preamble = _PREAMBLE.pack(self._frame.numel(), settings_digest, int(frame is None))
        self._preamble = torch.frombuffer(bytearray(preamble), dtype=torch.uint8)
        self._received, self._work = self._gather()

    def _gather(self) -> tuple[Tensor, dist.Work]:
        outgoing = torch.zeros(self._slot.bytes, dtype=torch.uint8)
        outgoing[: _PREAMBLE.size] = self._preamble
        if _PREAMBLE.size + self._frame.numel() <= self._slot.bytes:
            outgoing[_PREAMBLE.size : _PREAMBLE.size + self._frame.numel()] = self._frame
        peers = self._group.size()
        received = torch.empty((peers, outgoing.numel()), dtype=torch.uint8, device=self._device)
        work = dist.all_gather(
            list(received.unbind()), outgoing.to(self._device), group=self._group, async_op=True
        )
        if work is None:
            raise ExchangeError("this process is no member of the process group it trains in")
        self._meter.add(sent_bytes=outgoing.numel(), wire_bytes=outgoing.numel() * (peers - 1))
        return received, work

    def frames(self) -> list[Tensor]:
        """Return the frames in rank order, each a 1-D uint8 tensor on the CPU.

        Raises ExchangeError, on every rank, where a rank failed or has other settings.
        """
        with self._meter.timed("wait_s"):
            self._work.wait()
            slots = self._received.cpu()
            lengths = self._lengths(slots)
            fits = _PREAMBLE.size + max(lengths) <= self._slot.bytes
            self._slot.fit(lengths)
            if not fits:
                self._received, self._work = self._gather()
                self._work.wait()
                slots = self._received.cpu()
        return [
            slots[rank, _PREAMBLE.size : _PREAMBLE.size + length]
            for rank, length in enumerate(lengths)
        ]

    def _lengths(self, slots: Tensor) -> list[int]:
        heads = [_PREAMBLE.unpack(bytes(row[: _PREAMBLE.size].numpy().data)) for row in slots]
        failed = [str(rank) for rank, (_, _, failed) in enumerate(heads) if failed]
        if failed:
            raise ExchangeError(
                f"rank {', '.join(failed)} could not compress its gradient, and says why in an "
                "error of its own; this rank stops with it"
            )
        others = [str(rank) for rank, (_, used, _) in enumerate(heads) if used != heads[0][1]]
        if others:
            raise SettingsDifferError(f"rank {', '.join(others)} has other settings than rank 0")
        return [length for length, _, _ in heads]


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


def agree(text: str, *, group: dist.ProcessGroup, device: torch.device) -> None:
    """Return when every rank of `group` has the same `text`; a collective that all must call.

    Raises ExchangeError on every rank, quoting the first line in which two ranks differ.
    """
    texts = gather_texts(text, group=group, device=device)
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
