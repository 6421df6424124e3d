"""Split-reduce: each rank reduces one part of the index space, and passes on its largest sums.

Two frames on each link whatever the number of ranks, where an all-gather puts W - 1. Sources:
Renggli et al., "SparCML" (SC 2019); Li and Hoefler, "Near-Optimal Sparse Allreduce" (PPoPP 2022),
whose volume bound of 6k this keeps to 2k by one exchange for each half.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.compress.compressor import Compressed, FlatCompressor, decode_parts, write_sum
from topq_dist.compress.feedback import Layout
from topq_dist.compress.frame import Frame, FrameError
from topq_dist.ddp.exchange import Exchange, Job, Link, Pending
from topq_dist.ddp.messages import (
    NO_FRAME,
    ExchangeError,
    FrameGather,
    Slot,
    check_heads,
    frame_in,
    member,
    pack,
    unpack,
)


class SplitReduce(Exchange):
    """Send each part's frame to the rank that owns the part; gather the owners' reduced frames.

    An owner passes on as many elements of its part as a rank has sent it on average, and owes the
    rest itself; without error feedback it passes on all.
    """

    def __init__(self, link: Link, compressor: FlatCompressor) -> None:
        self._link = link
        self._compressor = compressor
        self._slots: dict[Layout, tuple[Slot, Slot]] = {}

    def launch(self, job: Job) -> Pending:
        slots = self._slots.setdefault(job.layout, (Slot(spare=0.1), Slot(spare=0.1)))
        return _Splitting(job, self._link, self._compressor, *slots)


class _Splitting:
    def __init__(
        self, job: Job, link: Link, compressor: FlatCompressor, slot: Slot, reduced_slot: Slot
    ) -> None:
        self._job = job
        self._link = link
        self._compressor = compressor
        self._slot = slot
        self._reduced_slot = reduced_slot
        self._compressed = job.compress(link.size)
        self._reduction: Compressed | None = None
        self._error: ExchangeError | None = None
        self._failure: FrameError | None = None
        self._gather: FrameGather | None = None
        self._reduced: list[Frame] = []
        self._scatter()

    def _scatter(self) -> None:
        size, device = self._link.size, self._link.device
        outgoing = torch.zeros((size, self._slot.bytes), dtype=torch.uint8)
        frames = [None] * size if self._compressed is None else self._compressed.frames
        for row, frame in zip(outgoing, frames, strict=True):
            pack(row, frame, self._job.settings_digest)
        self._received = torch.empty_like(outgoing, device=device)
        work = dist.all_to_all_single(
            self._received, outgoing.to(device), group=self._link.group, async_op=True
        )
        self._work = member(work)
        self._link.meter.add(sent_bytes=outgoing.numel(), wire_bytes=self._slot.bytes * (size - 1))

    def advance(self) -> None:
        with self._link.meter.timed("wait_s"):
            self._work.wait()
        slots = self._received.cpu()
        heads = [unpack(row) for row in slots]
        try:
            # every rank has written to every rank, so all of them raise here or none
            check_heads(heads)
        except ExchangeError as error:
            self._error = error
            return
        longest = max(head.frame_bytes for head in heads)
        frame: Tensor | None = NO_FRAME
        if self._slot.holds(longest):
            frames = [frame_in(row, head) for row, head in zip(slots, heads, strict=True)]
            frame = self._reduce(frames)
        self._gather = FrameGather(
            frame,
            settings_digest=self._job.settings_digest,
            slot=self._reduced_slot,
            group=self._link.group,
            device=self._link.device,
            meter=self._link.meter,
            note=longest,
        )

    def _reduce(self, frames: list[Tensor]) -> Tensor | None:
        try:
            with self._link.meter.timed("select_s"):
                self._reduction = self._compressor.reduce(
                    frames, self._job.layout, part=self._link.rank, parts=self._link.size
                )
        except FrameError as error:
            # raised once the other ranks have been told
            self._failure = error
            return None
        return self._reduction.frames[0]

    def receive(self) -> bool:
        while True:
            if self._error is not None:
                raise self._error
            if self._gather is None:
                raise RuntimeError("receive comes after advance")
            try:
                frames = self._gather.frames()
            except ExchangeError as error:
                raise self._failure or error from None
            longest = self._gather.highest_note
            fitted = self._slot.holds(longest)
            self._slot.fit([longest])
            if fitted:
                self._reduced = decode_parts(frames, numel=self._job.bucket.numel())
                return all(frame.finite for frame in self._reduced)
            # some frame had no room: every rank has read so, and all start over
            self._scatter()
            self.advance()

    def deliver(self) -> None:
        if self._compressed is not None:
            self._compressed.commit()
        if self._reduction is not None:
            self._reduction.commit()
        write_sum(self._reduced, divisor=1, out=self._job.bucket)
