"""Frames between ranks: one all-gather a bucket, in slots that every rank sizes alike.

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

# frame length in bytes, digest of the settings it was made with, 1 where the rank has failed
_PREAMBLE = struct.Struct("<QII")
_SLOT_ALIGN_BYTES = 64


class ExchangeError(RuntimeError):
    """Ranks disagree, or one of them failed; raised on every rank of the group."""


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
    this rank has failed and lets the others know instead of leaving them to wait.
    """

    def __init__(
        self,
        frame: Tensor | None,
        *,
        settings_digest: int,
        slot: Slot,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._group = group
        self._slot = slot
        self._device = device
        self._frame = frame if frame is not None else torch.empty(0, dtype=torch.uint8)
        self._digest = settings_digest
        preamble = _PREAMBLE.pack(self._frame.numel(), settings_digest, int(frame is None))
        self._preamble = torch.frombuffer(bytearray(preamble), dtype=torch.uint8)
        self.sent_bytes = 0
        self._received, self._work = self._gather(slot.bytes)

    def _gather(self, slot_bytes: int) -> tuple[Tensor, dist.Work]:
        outgoing = torch.zeros(slot_bytes, dtype=torch.uint8, device=self._device)
        outgoing[: _PREAMBLE.size] = self._preamble
        fitting = self._frame[: slot_bytes - _PREAMBLE.size]
        if fitting.numel() == self._frame.numel():
            outgoing[_PREAMBLE.size : _PREAMBLE.size + fitting.numel()] = fitting
        received = torch.empty(
            (self._group.size(), slot_bytes), dtype=torch.uint8, device=self._device
        )
        work = dist.all_gather(list(received.unbind()), outgoing, group=self._group, async_op=True)
        self.sent_bytes += slot_bytes
        if work is None:
            raise ExchangeError("this process is no member of the process group it trains in")
        return received, work

    def frames(self) -> list[Tensor]:
        """Return the frames in rank order, each a 1-D uint8 tensor on the CPU.

        Raises ExchangeError, on every rank, where a rank failed or has other settings.
        """
        self._work.wait()
        slots = self._received.cpu()
        lengths = self._check(slots)
        if _PREAMBLE.size + max(lengths) > self._slot.bytes:
            self._slot.fit(lengths)
            received, work = self._gather(self._slot.bytes)
            work.wait()
            slots = received.cpu()
        else:
            self._slot.fit(lengths)
        return [
            slots[rank, _PREAMBLE.size : _PREAMBLE.size + length]
            for rank, length in enumerate(lengths)
        ]

    def _check(self, slots: Tensor) -> list[int]:
        heads = [_PREAMBLE.unpack(bytes(row[: _PREAMBLE.size].numpy().data)) for row in slots]
        failed = [rank for rank, head in enumerate(heads) if head[2]]
        if failed:
            raise ExchangeError(
                f"rank {_ranks(failed)} could not compress its gradient and says why in its own "
                "error; this rank stops with it"
            )
        differing = [rank for rank, head in enumerate(heads) if head[1] != heads[0][1]]
        if differing:
            raise SettingsDifferError(differing)
        return [head[0] for head in heads]


class SettingsDifferError(ExchangeError):
    """Some ranks compressed with other settings than rank 0; every rank sees the same list."""

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__(f"rank {_ranks(ranks)} compressed with other settings than rank 0")


def _ranks(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)


def agree(text: str, *, group: dist.ProcessGroup, device: torch.device) -> None:
    """Return when every rank of `group` has the same `text`; a collective that all must call.

    Raises ExchangeError on every rank, quoting the first line in which two ranks differ.
    """
    mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
    size = group.size()
    lengths = torch.empty((size, 1), dtype=torch.int64, device=device)
    own_length = torch.tensor([mine.numel()], device=device)
    dist.all_gather(list(lengths.unbind()), own_length, group=group)
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: mine.numel()] = mine
    gathered = torch.empty((size, longest), dtype=torch.uint8, device=device)
    dist.all_gather(list(gathered.unbind()), padded, group=group)
    texts = [
        bytes(row[: int(length)].cpu().numpy().data).decode()
        for row, length in zip(gathered, lengths, strict=True)
    ]
    for rank, other in enumerate(texts):
        if other != texts[0]:
            first, second = _first_difference(texts[0], other)
            raise ExchangeError(
                f"ranks disagree: rank 0 has {first!r}, rank {rank} has {second!r}; "
                "every rank must register the hook with the same settings on the same model"
            )


def _first_difference(one: str, other: str) -> tuple[str, str]:
    lines, others = one.split("\n"), other.split("\n")
    for first, second in zip(lines, others, strict=False):
        if first != second:
            return first, second
    shorter = min(len(lines), len(others))
    end = "nothing more"
    return (
        lines[shorter] if len(lines) > shorter else end,
        others[shorter] if len(others) > shorter else end,
    )
