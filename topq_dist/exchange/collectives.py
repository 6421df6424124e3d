"""Frames between ranks, in slots that every rank sizes alike, and agreement between ranks.

A slot is sized from what its users know alike, the frames of the last steps, so that one collective
carries frames of different lengths. A frame that does not fit its slot (the first one never does)
announces its length, and all ranks, having read the same announcements, go on to a second one.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.compress.coherence import NO_COHERENCE, Coherence, total
from topq_dist.exchange.agreement import ExchangeError, SettingsDifferError
from topq_dist.telemetry import Meter

# frame length, digest of the settings it was made with, whether the rank has failed, whether a
# frame of its has no room in its slot, the two sums of its coherence
_HEAD = struct.Struct("<QIHHdd")
_SLOT_ALIGN_BYTES = 64
# room costs bytes in every step, a tail a round trip where a frame has grown by more than this
_SPARE = 0.05
_CPU = torch.device("cpu")
NO_FRAME = torch.empty(0, dtype=torch.uint8)


class Head(NamedTuple):
    """What a slot says about the frame in it."""

    frame_bytes: int
    settings_digest: int
    failed: bool
    tailed: bool
    coherence: Coherence = NO_COHERENCE


class KeptBuffer:
    """A byte buffer that is kept from one step to the next, lent to one collective at a time."""

    def __init__(self) -> None:
        self._buffer = NO_FRAME
        self._lent = False

    def take(self, numel: int, device: torch.device) -> Tensor:
        """Return `numel` bytes of any content, this borrower's until `release`."""
        # what an aborted pass never brought back may still be written to
        if self._lent or self._buffer.numel() < numel or self._buffer.device != device:
            self._buffer = torch.empty(numel + numel // 8, dtype=torch.uint8, device=device)
        self._lent = True
        return self._buffer[:numel]

    def release(self) -> None:
        """Take the bytes back."""
        self._lent = False


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


@dataclass(frozen=True, kw_only=True)
class GatherLane:
    """What one bucket keeps between steps for its all-gather."""

    slot: Slot = field(default_factory=Slot)
    sent: KeptBuffer = field(default_factory=KeptBuffer)
    received: KeptBuffer = field(default_factory=KeptBuffer)


def pack(
    row: Tensor,
    frame: Tensor | None,
    settings_digest: int,
    *,
    coherence: Coherence,
    tailed: bool = False,
) -> None:
    """Write a slot, its head and what it holds of the frame; None says that this rank has failed.

    tailed: whether a frame of this rank, this one or another, does not fit its slot.
    """
    length = 0 if frame is None else frame.numel()
    fields = _HEAD.pack(length, settings_digest, frame is None, tailed, *coherence)
    row[: _HEAD.size] = torch.frombuffer(bytearray(fields), dtype=torch.uint8)
    if frame is not None:
        held = frame[: row.numel() - _HEAD.size]
        row[_HEAD.size : _HEAD.size + held.numel()] = held


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


def member(work: dist.Work | None) -> dist.Work:
    """Return `work`, which torch leaves out for a process outside the group."""
    if work is None:
        raise RuntimeError("this process is no member of the process group it trains in")
    return work


class FrameGather:
    """The frames of one bucket on their way to every rank.

    Starts an asynchronous all-gather at once; `frames` waits for it. A frame of None says that
    this rank has failed, and lets the others know instead of leaving them to wait.

    coherence: this rank's; once received, the sum of all ranks'.
    """

    def __init__(
        self,
        frame: Tensor | None,
        *,
        settings_digest: int,
        lane: GatherLane,
        group: dist.ProcessGroup,
        device: torch.device,
        meter: Meter,
        coherence: Coherence = NO_COHERENCE,
    ) -> None:
        self.coherence = coherence
        self._group = group
        self._lane = lane
        self._device = device
        self._meter = meter
        self._frame = frame
        self._settings_digest = settings_digest
        self._received, self._work = self._gather()

    def _gather(self) -> tuple[Tensor, dist.Work]:
        lane = self._lane
        sent = lane.sent.take(lane.slot.bytes, _CPU)
        pack(sent, self._frame, self._settings_digest, coherence=self.coherence)
        peers = self._group.size()
        received = lane.received.take(peers * sent.numel(), self._device).view(peers, -1)
        work = dist.all_gather(
            list(received.unbind()), sent.to(self._device), group=self._group, async_op=True
        )
        self._meter.add(sent_bytes=sent.numel(), wire_bytes=sent.numel() * (peers - 1))
        return received, member(work)

    def frames(self) -> list[Tensor]:
        """Return the frames in rank order, each a 1-D uint8 tensor on the CPU.

        They are valid until the next gather on this lane. Raises ExchangeError, on every
        rank, where a rank failed or has other settings.
        """
        with self._meter.timed("wait_s"):
            slots, heads = self._wait()
            check_heads(heads)
            longest = max(head.frame_bytes for head in heads)
            fits = self._lane.slot.holds(longest)
            self._lane.slot.fit(longest)
            if not fits:
                self._received, self._work = self._gather()
                slots, heads = self._wait()
        self.coherence = total(head.coherence for head in heads)
        return [frame_in(row, head) for row, head in zip(slots, heads, strict=True)]

    def _wait(self) -> tuple[Tensor, list[Head]]:
        self._work.wait()
        self._lane.sent.release()
        self._lane.received.release()
        slots = self._received.cpu()
        return slots, [unpack(row) for row in slots]


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """What one bucket keeps between steps: a slot to and from each rank, and the buffers."""

    outgoing: list[Slot]
    incoming: list[Slot]
    sent: KeptBuffer = field(default_factory=KeptBuffer)
    received: KeptBuffer = field(default_factory=KeptBuffer)

    @classmethod
    def among(cls, size: int) -> Lanes:
        """Return the lanes of a rank among `size`, with room for heads alone."""
        return cls(
            outgoing=[Slot(_SPARE) for _ in range(size)],
            incoming=[Slot(_SPARE) for _ in range(size)],
        )


class FrameSwap:
    """Frames on their way, one to each rank; None says that this rank has failed.

    Starts an asynchronous all-to-all at once; `frames` waits for it. What a rank has for itself
    stays where it is.

    coherence: this rank's; once received, the sum of all ranks'.
    """

    def __init__(
        self,
        frames: Sequence[Tensor] | None,
        *,
        settings_digest: int,
        lanes: Lanes,
        group: dist.ProcessGroup,
        device: torch.device,
        meter: Meter,
        coherence: Coherence = NO_COHERENCE,
    ) -> None:
        self.coherence = coherence
        self._mine = frames
        self._lanes = lanes
        self._group = group
        self._device = device
        self._meter = meter
        self._others = [peer for peer in range(group.size()) if peer != group.rank()]
        tailed = frames is not None and any(
            not lanes.outgoing[peer].holds(frames[peer].numel()) for peer in self._others
        )
        # of which only what it says of this rank counts
        self._head = Head(0, settings_digest, frames is None, tailed, coherence)
        self._sizes = {peer: lanes.incoming[peer].bytes for peer in self._others}
        sizes = {peer: lanes.outgoing[peer].bytes for peer in self._others}
        sent = lanes.sent.take(sum(sizes.values()), _CPU)
        for peer, row in _split(sent, sizes).items():
            pack(
                row,
                None if frames is None else frames[peer],
                settings_digest,
                coherence=coherence,
                tailed=tailed,
            )
        self._received = lanes.received.take(sum(self._sizes.values()), device)
        self._work = self._swap(sent, sizes, self._received, self._sizes)

    def _swap(
        self,
        sent: Tensor,
        sizes: Mapping[int, int],
        received: Tensor,
        received_sizes: Mapping[int, int],
    ) -> dist.Work:
        peers = range(self._group.size())
        self._meter.add(sent_bytes=sent.numel(), wire_bytes=sent.numel())
        return member(
            dist.all_to_all_single(
                received,
                sent.to(self._device),
                [received_sizes.get(peer, 0) for peer in peers],
                [sizes.get(peer, 0) for peer in peers],
                group=self._group,
                async_op=True,
            )
        )

    def frames(self) -> list[Tensor]:
        """Return each rank's frame for this one, in rank order, 1-D uint8 tensors on the CPU.

        They are valid until the next swap on these lanes. Raises ExchangeError, on every rank,
        where a rank failed or has other settings.
        """
        with self._meter.timed("wait_s"):
            self._work.wait()
            rows = _split(self._received.cpu(), self._sizes)
            heads = {peer: unpack(row) for peer, row in rows.items()}
            # every rank has written to every rank, so all of them raise here or none
            every = [heads.get(peer, self._head) for peer in range(self._group.size())]
            check_heads(every)
            self.coherence = total(head.coherence for head in every)
            if self._mine is None:
                raise RuntimeError("a rank that has failed heard of it from no one")
            frames = {peer: frame_in(row, heads[peer]) for peer, row in rows.items()}
            if self._head.tailed or any(head.tailed for head in heads.values()):
                lengths = {peer: head.frame_bytes for peer, head in heads.items()}
                for peer, tail in self._tails(self._mine, lengths).items():
                    frames[peer] = torch.cat([frames[peer], tail])
        for peer in self._others:
            self._lanes.outgoing[peer].fit(self._mine[peer].numel())
            self._lanes.incoming[peer].fit(heads[peer].frame_bytes)
        self._lanes.sent.release()
        self._lanes.received.release()
        return [frames.get(peer, self._mine[peer]) for peer in range(self._group.size())]

    def _tails(self, mine: Sequence[Tensor], lengths: Mapping[int, int]) -> dict[int, Tensor]:
        outgoing, incoming = self._lanes.outgoing, self._lanes.incoming
        tails = {peer: mine[peer][outgoing[peer].room_bytes :] for peer in self._others}
        sizes = {peer: tail.numel() for peer, tail in tails.items()}
        back = {peer: max(0, lengths[peer] - incoming[peer].room_bytes) for peer in self._others}
        received = torch.empty(sum(back.values()), dtype=torch.uint8, device=self._device)
        self._swap(torch.cat([*tails.values()]), sizes, received, back).wait()
        return _split(received.cpu(), back)


def _split(buffer: Tensor, sizes: Mapping[int, int]) -> dict[int, Tensor]:
    return dict(zip(sizes, torch.split(buffer, list(sizes.values())), strict=True))
