"""A frame from every rank to every other, each of its own length, in one collective or two.

Every pair of ranks has a slot, sized from what both know: its frames of the last steps. What does
not fit is the frame's tail. Each head says whether its sender has a tail for anybody, so all ranks
know alike whether a second collective carries the tails, and that one has exactly their lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.compress.coherence import NO_COHERENCE, Coherence, total
from topq_dist.ddp.messages import (
    Head,
    KeptBuffer,
    Slot,
    check_heads,
    frame_in,
    member,
    pack,
    unpack,
)
from topq_dist.telemetry import Meter

# room costs bytes in every step, a tail a round trip where a frame has grown by more than this
_SPARE = 0.05
_CPU = torch.device("cpu")


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
